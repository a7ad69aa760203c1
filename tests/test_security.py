"""What others wrote is not run: configs and overrides under --safe, and files that are downloaded."""

import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.request
import urllib.response
from dataclasses import dataclass, field, replace
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from rich.console import Console

from vision_ssm.engine.config import build, config_names, load_config
from vision_ssm.engine.demo import ENTRANTS
from vision_ssm.engine.zoo import download as downloads
from vision_ssm.engine.zoo import published
from vision_ssm.engine.zoo.download import DownloadError, cache_folder, download
from vision_ssm.model_zoo.catalogue import cards
from vision_ssm.tools import __main__ as cli

UNET = "medical/deep_grey_vmamba_unet"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, whose config writes the file ``ran`` when it is read, and a module that does."""
    for name in ("evil.py", "trap_module.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nscore = 'a'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", config_names())
def test_every_config_of_the_package_is_read(name: str) -> None:
    assert load_config(name, safe=True).model == load_config(name).model


def test_overrides_of_plain_data_are_accepted() -> None:
    overrides = [
        "train_cfg.max_iters=7",
        "log_processor={'window_size': 9}",
        "optim_wrapper.optimizer.weight_decay=0",
        "model.net.mixer=identity",
        "model.net.decoder_channels=(8, 16, 32, 64)",
        "model.augment.0.mirror=0.25",
        "train_dataloader.num_workers=2",
        "val_dataloader=None",
        "data_root=../My data/Task04-Hippocampus",
        "launcher=pytorch",
        "randomness={'seed': 3}",
        "default_hooks.watch.action=skip",
        "default_hooks.watch.limit=3",
    ]
    config = load_config(UNET, overrides, safe=True)
    assert config.train_dataloader.dataset == load_config(UNET, overrides).train_dataloader.dataset
    assert config.train_cfg.max_iters == 7
    assert config.log_processor.window_size == 9
    assert config.log_processor.by_epoch is False
    assert build(config.model.net).up is not None


@pytest.mark.parametrize(
    "name",
    ["evil.py", "./evil.py", "evil", "../configs/image/evil", "_base_/runtime", "medical/../medical/acdc_umamba", ""],
)
def test_a_config_outside_the_package_is_not_read(trap: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no config {name!r}; give one of: experiment/ct_abdomen, .*{UNET}"):
        load_config(name, safe=True)
    assert not (trap / "ran").exists()


def test_a_file_with_the_name_of_a_config_does_not_stand_in_for_it(trap: Path) -> None:
    (trap / "medical").mkdir()
    (trap / f"{UNET}.py").write_text((trap / "evil.py").read_text())
    assert load_config(f"{UNET}.py", safe=True).score == "dice/mean"
    assert not (trap / "ran").exists()
    assert load_config(f"{UNET}.py").score == "a"  # without --safe the file comes first
    assert (trap / "ran").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.net.type=os.system", "the key 'type' could bring code"),
        ("model.net.type='trap_module.score'", "the key 'type' could bring code"),
        ("model={'net': {'type': 'os.system'}}", "'type' could bring code"),
        ("model.augment=[{'type': 'os.system'}]", "'type' could bring code"),
        ("custom_hooks=[{'type': 'trap_module.score'}]", "'type' could bring code"),
        ("custom_imports={'imports': ['trap_module']}", "has no such entry"),
        ("default_scope=trap_module", "has no such entry"),
        ("env_cfg.dist_cfg={'backend': 'nccl'}", "unknown key 'env_cfg'"),
        ("optim_wrapper.constructor=trap_module.score", "nor an argument that is known by name"),
        ("train_cfg.max_iters=10**9", "neither a literal nor a plain word"),
        ("data_root=__import__('os').getcwd()", "neither a literal nor a plain word"),
        ("data_root=lambda x: x()", "neither a literal nor a plain word"),
        ("data_root={{ fileDirname }}", "neither a literal nor a plain word"),
        ("data_root='{{ $HOME:x }}'", "neither a literal nor a plain word"),
        ("data_root=$HOME", "neither a literal nor a plain word"),
        ("model.net={'_delete_': True, 'in_channels': 5}", "the key '_delete_' could bring code"),
        ("_base_=evil.py", "the key '_base_' could bring code"),
        ("model._scope_=trap_module", "the key '_scope_' could bring code"),
        ("model.loss=trap_module.score", "it describes an object"),
        ("model.net=5", "it describes an object"),
        ("prepare=[]", "it describes an object"),
        ("train_cfg.max_iters=b'1'", "is no number, string"),
        ("train_cfg.max_iters={1, 2}", "is no number, string"),
        ("train_cfg.max_iters=1j", "is no number, string"),
        ("train_cfg.max_iters=...", "is no number, string"),
        ("model.net.__class__=5", "the key '__class__' could bring code"),
        ("train-cfg.max_iters=5", "the key 'train-cfg' could bring code"),
        ("max_iters", "is not KEY=VALUE"),
        ("model.augment.9=1", "unknown key '9'"),
        ("model.augment.mirror=1", "unknown key 'mirror'"),
        ("train_cfg.max_itres=3", "nor an argument that is known by name"),
    ],
)
def test_an_override_that_could_run_code_is_refused(trap: Path, override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("**", r"\*\*")) as error:
        load_config(UNET, [override], safe=True)
    key = override.partition("=")[0]
    assert key.split(".")[0] in str(error.value)
    assert not (trap / "ran").exists()


READERS = {
    "train": ["evil.py"],
    "eval": ["evil.py", "weights.safetensors"],
    "predict": ["evil.py", "weights.safetensors", "in.nii.gz", "out.nii.gz"],
    "experiment": ["run", "evil.py", "--out", "runs.jsonl", "--seconds", "1"],
    "export": ["evil.py", "--to", "pt2", "--random-weights"],
    "bundle": ["create", "evil.py", "weights.safetensors", "out"],
}


@pytest.mark.parametrize("command", READERS)
def test_commands_take_safe_and_say_what_a_config_is(
    trap: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = READERS[command]
    assert cli.main([command, *arguments, "--safe"]) == 2
    assert "no config 'evil.py'; give one of" in capsys.readouterr().err
    assert not (trap / "ran").exists()
    subcommand = arguments[:1] if command in ("experiment", "bundle") else []
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, *subcommand, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a config is Python and runs as code when it is read" in shown


def test_the_quickstart_takes_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quickstart", "--safe", "--work-dir", str(tmp_path / "run"), "--set", "model.net.type=os.system"]
    assert cli.main(command) == 2
    assert "--safe refuses model.net.type" in capsys.readouterr().err
    for entrant in ENTRANTS:
        load_config(entrant.config, entrant.overrides, safe=True)


CONTENT = bytes(range(256)) * 9000  # more than two blocks
HASH = hashlib.sha256(CONTENT).hexdigest()
URL = "https://zoo.example/weights.pth"


@dataclass
class Server(urllib.request.HTTPSHandler):
    """What stands where TLS would: answers by address, and remembers what was asked."""

    answers: dict[str, Any] = field(default_factory=lambda: {URL: CONTENT})
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Length": str(len(CONTENT))})
    asked: list[str] = field(default_factory=list)

    def https_open(self, request: Any) -> Any:
        self.asked.append(request.full_url)
        answer = self.answers.get(request.full_url, 404)
        if isinstance(answer, BaseException):
            raise answer
        headers = Message()
        code, body = 200, b""
        if isinstance(answer, str):
            code = 302
            headers["Location"] = answer
        elif isinstance(answer, int):
            code = answer
        else:
            body = answer
            for name, value in self.headers.items():
                headers[name] = value
        response = urllib.response.addinfourl(io.BytesIO(body), headers, request.full_url, code)
        response.msg = "as told"
        return response


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(downloads, "HTTPSHandler", lambda: server)
    return server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_download_with_its_hash_is_whole(server: Server, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    download(URL, target, sha256=HASH.upper(), progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert files(target.parent) == [target.name]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(seen) > 2


def test_redirects_from_https_to_https_are_followed(server: Server, target: Path) -> None:
    server.answers = {URL: "https://mirror.example/a", "https://mirror.example/a": CONTENT}
    download(URL, target, sha256=HASH)
    assert target.read_bytes() == CONTENT
    assert server.asked == [URL, "https://mirror.example/a"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another hash": ({"sha256": "0" * 64}, rf"has the SHA-256 {HASH}, not 0{{64}}; nothing of it is kept"),
    "to http": ({"answers": {URL: "http://mirror.example/a"}}, "http://mirror.example/a is not an https address"),
    "to a file": ({"answers": {URL: "file:///etc/passwd"}}, "Redirection to url 'file:///etc/passwd' is not allowed"),
    "to ftp": ({"answers": {URL: "ftp://mirror.example/a"}}, "is not an https address"),
    "in circles": ({"answers": {URL: URL}}, "the server answers 302"),
    "absent": ({"answers": {}}, "the server answers 404"),
    "down": ({"answers": {URL: 503}}, "the server answers 503"),
    "unreachable": ({"answers": {URL: URLError("no route")}}, "cannot be reached: no route"),
    "reset": ({"answers": {URL: ConnectionResetError("reset")}}, "reset"),
    "cut": ({"answers": {URL: CONTENT[:-1]}}, f"broke off after {len(CONTENT) - 1} of {len(CONTENT)} bytes"),
    "too large, as announced": ({"limit": 1000}, f"has {len(CONTENT)} bytes, more than the 1000"),
    "too large, in silence": ({"limit": 1000, "headers": {}}, "sends more than the 1000 bytes"),
    "http": ({"url": "http://zoo.example/weights.pth"}, "is not an https address"),
    "file": ({"url": "file:///etc/passwd"}, "is not an https address"),
    "no host": ({"url": "https:///weights.pth"}, "is not an https address"),
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over a file"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_download_that_is_refused_leaves_nothing_behind(
    server: Server, target: Path, case: str, earlier: bool
) -> None:
    changes, message = REFUSED[case]
    for name in ("answers", "headers"):
        setattr(server, name, changes.get(name, getattr(server, name)))
    if earlier:
        target.parent.mkdir()
        target.write_text("precious")
    with pytest.raises(DownloadError, match=message):
        download(
            changes.get("url", URL),
            target,
            sha256=changes.get("sha256", HASH),
            limit=changes.get("limit", downloads.LIMIT),
        )
    assert files(target.parent) == [target.name] * earlier
    assert not earlier or target.read_text() == "precious"


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_an_interrupted_download_leaves_nothing_behind(
    server: Server, target: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(descriptor: int) -> None:
        assert len(files(target.parent)) == 1
        raise failure

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(type(failure)):
        download(URL, target, sha256=HASH)
    assert files(target.parent) == []


def test_the_opener_knows_https_alone() -> None:
    opener = downloads.encrypted()
    assert "https" in opener.handle_open
    assert not {"http", "ftp", "file", "data"} & set(opener.handle_open)
    with pytest.raises(URLError, match="unknown url type: http"):
        opener.open("http://zoo.example/weights.pth")


@pytest.mark.parametrize("given", ["relative", "absolute", "none"])
def test_the_cache_is_the_users_own(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given != "none":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache" if given == "relative" else str(tmp_path / "xdg"))
    folder = tmp_path / ("xdg" if given == "absolute" else ".cache")  # the specification ignores relative ones
    assert cache_folder() == folder / "vision_ssm"


@pytest.fixture
def card(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card of the catalogue whose file the server has, with a cache of its own."""
    card = replace(cards()[-1], url=URL)
    monkeypatch.setattr(published, "cards", lambda: (card,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return card


def test_a_fetched_file_is_kept_in_the_cache_and_fetched_once(
    card: Any, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["zoo", "fetch", card.model, "--sha256", HASH]
    assert cli.main(command) == 0
    fetched = Path(capsys.readouterr().out.strip())
    assert fetched == tmp_path / "vision_ssm" / "zoo" / HASH / card.file
    assert cli.main(command) == 0
    assert server.asked == [URL]
    fetched.write_text("damaged")
    assert published.fetch(card.file, sha256=HASH, console=Console(quiet=True)) == fetched
    assert fetched.read_bytes() == CONTENT


def test_a_wrong_hash_leaves_the_cache_empty(card: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zoo", "fetch", card.model, "--sha256", "0" * 64]) == 2
    assert f"has the SHA-256 {HASH}" in capsys.readouterr().err
    assert list((tmp_path / "vision_ssm" / "zoo").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sha256", "message"),
    [
        ({"sha256": None}, None, "the authors state no SHA-256"),
        ({"sha256": HASH}, "1" * 64, f"was published with the SHA-256 {HASH}, not 1"),
        ({"url": None}, HASH, "no address of .* is known; it is published at https"),
        ({"url": URL.replace("https", "http")}, HASH, "is not an https address"),
        ({}, "abc", "a SHA-256 has 64 hexadecimal digits; got 'abc'"),
    ],
)
def test_a_file_that_cannot_be_checked_is_not_fetched(
    card: Any, server: Server, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sha256: str, message: str
) -> None:
    monkeypatch.setattr(published, "cards", lambda: (replace(card, **changes),))
    with pytest.raises((ValueError, DownloadError), match=message):
        published.fetch(card.model, sha256=sha256, console=Console(quiet=True))
    assert server.asked == []


def test_a_name_that_is_not_one_file_lists_the_files() -> None:
    with pytest.raises(ValueError, match=r"no published files of 'resnet50'; name one of .*\.pth"):
        published.fetch("resnet50", console=Console(quiet=True))


def test_the_addresses_of_the_cards_are_encrypted() -> None:
    assert all(card.page.startswith("https://") for card in cards())
    assert all(card.url is None or card.url.startswith("https://") for card in cards())


AUDIT = Path(__file__).parents[1] / ".ci" / "audit"
KNOWN = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([KNOWN, UNKNOWN], 0, "audit: 1 packages checked, 1 not in the index, 0 vulnerabilities"),
        ([KNOWN, FLAWED], 1, "b 2: CVE-1, fixed in 3\naudit: 2 packages checked"),
        ([UNKNOWN], 0, "audit skipped, nothing was checked: the index knows none of 1 packages"),
        (None, 0, "audit skipped, nothing was checked: no route"),
    ],
)
def test_the_audit_fails_on_findings_and_says_when_it_cannot_look(
    tmp_path: Path, packages: list[Any] | None, status: int, said: str
) -> None:
    report = json.dumps({"dependencies": packages})
    write = f"pathlib.Path(sys.argv[-1].removeprefix('--output=')).write_text({report!r})"
    code = "sys.exit('no route')" if packages is None else write
    (tmp_path / "pip_audit.py").write_text(f"import pathlib, sys\n{code}\n")
    done = subprocess.run(
        [sys.executable, AUDIT], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert said in done.stdout
