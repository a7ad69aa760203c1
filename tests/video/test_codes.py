"""Tokenizers and models of codes: whole clips against steps, states that go on, sampling, bad input."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.video import (
    CODE_MODELS,
    CodedVideo,
    NextCode,
    Rollout,
    Sampler,
    Tokenizer,
    VQAutoencoder,
    code_loss,
    convs5_stack,
)
from vision_ssm.video.next_map import AT_ONCE
from vision_ssm.video.tokenizer import Codebook

CODES = 12


def small(*, layers=2, state=4, **options):
    stack = convs5_stack(4, state=state, layers=layers, groups=2)
    sizes = {"embedding": 3, "encoder": (32, 32), "decoder": (32, 32), "decoder_units": 1}
    return NextCode(stack, CODES, dim=4, **{**sizes, **options})


def autoencoder(**options):
    sizes = {"codes": CODES, "size": 4, "encoder": (32, 32), "decoder": (32, 32)}
    return VQAutoencoder(**{**sizes, **options})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Levels(Tokenizer):
    """A pixel's grey level, one of ``CODES``; written as a user would write one."""

    channels, codes, stride = 1, CODES, 1

    def encode(self, frames):
        return ((frames[:, :, 0] + 1) / 2 * (CODES - 1)).round().long()

    def decode(self, codes):
        return (codes / (CODES - 1) * 2 - 1)[:, :, None]


@pytest.mark.parametrize(("name", "stack"), [("convs5_dmlab", 75.5), ("convs5_minecraft", 113.3)])
def test_published_sizes(name, stack):
    """Millions of parameters, to the digits that are known."""
    with torch.device("meta"):
        model = CODE_MODELS[name](1024)
    assert sum(m.numel() for m in model.stack.parameters()) / 1e6 == pytest.approx(stack, abs=0.05)


def test_whole_clips_are_their_steps():
    model = small(actions=3).double()
    codes, actions = torch.randint(0, CODES, (2, 5, 4, 6)), torch.randint(-1, 3, (2, 5))
    whole, last = model(codes, actions)
    assert whole.shape == (2, 5, CODES, 4, 6)
    state = None
    for t in range(5):
        logits, state = model.step(codes[:, t], actions[:, t], state)
        assert_close(logits, whole[:, t])
    assert_close(state, last)


def test_generation_feeds_codes_back():
    """Each code that is generated is the most probable one by the whole clip before it."""
    model = small(actions=3).double()
    context, actions = torch.randint(0, CODES, (2, 3, 4, 4)), torch.randint(-1, 3, (2, 7))
    codes, _ = model.generate(context, 4, actions=actions, choose=Sampler(temperature=0))
    clip = torch.cat([context, codes], dim=1)
    assert_close(model(clip[:, :-1], actions[:, 1:])[0][:, 2:].argmax(dim=2), codes)


def test_a_step_compiles_whole():
    model = small(actions=3)
    context, actions = torch.randint(0, CODES, (1, 2, 4, 4)), torch.tensor([[0, 2, -1, 1, 2]])
    most = Sampler(temperature=0)
    compiled = Rollout(model, choose=most, accelerate=partial(torch.compile, backend="aot_eager", fullgraph=True))
    assert_close(
        compiled.generate(context, 3, actions=actions), model.generate(context, 3, actions=actions, choose=most)
    )


def test_sampling_goes_on_from_a_state():
    model = small(actions=2)
    context, actions = torch.randint(0, CODES, (1, 2, 4, 4)), torch.randint(0, 2, (1, 9))
    whole, last = model.generate(context, 7, actions=actions, choose=Sampler(generator=generator()))
    sampler = Sampler(generator=generator())
    first, state = model.generate(context, 3, actions=actions[:, :5], choose=sampler)
    second, state = model.generate(first[:, -1:], 4, actions=actions[:, 4:], state=state, choose=sampler)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert_close(state, last)


def test_sampling_is_that_of_its_generator():
    model = small()
    context = torch.randint(0, CODES, (1, 2, 4, 4))
    one, again, other = (model.generate(context, 6, choose=Sampler(generator=generator(seed)))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(torch.unique(model.generate(context, 6)[0])) > 2  # by default too, codes are drawn


def test_sampling_follows_the_odds():
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = odds.log().view(1, 4, 1, 1).expand(1, 4, 200, 200)

    def shares(**options):
        drawn = Sampler(**options, generator=generator())(logits)
        assert drawn.shape == (1, 200, 200)
        return torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()

    assert_close(shares(), odds, rtol=0, atol=0.01)
    assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.01)
    assert_close(shares(temperature=0.5), odds**2 / (odds**2).sum(), rtol=0, atol=0.01)
    assert_close(shares(temperature=0), torch.tensor([1.0, 0, 0, 0]))


def test_codes_that_are_not_shown_are_seen_as_such():
    model = small()
    codes = torch.randint(0, CODES, (1, 2, 4, 4))
    hidden = codes.clone()
    hidden[:, 1] = -1
    logits, _ = model(hidden)
    assert_close(logits[:, 0], model(codes)[0][:, 0])
    assert not torch.allclose(logits[:, 1], model(codes)[0][:, 1])
    logits[:, 1].sum().backward()
    assert not model.encoder[0].table.weight.grad[CODES - 1 :].isnan().any()


def test_only_the_places_asked_for_are_decoded():
    model = small()
    codes = torch.randint(0, CODES, (2, 5, 4, 4))
    at = torch.tensor([3, 0])
    assert_close(model.predict(codes, at=at)[0], model(codes)[0][:, at])


def test_the_loss_is_smoothed_cross_entropy():
    logits, codes = torch.randn(2, 3, CODES, 4, 5), torch.randint(0, CODES, (2, 3, 4, 5))
    goal = 0.99 * nn.functional.one_hot(codes, CODES).movedim(-1, 2) + 0.01 / CODES
    assert_close(code_loss(logits, codes), -(goal * logits.log_softmax(dim=2)).sum(dim=2).mean())


def test_frames_go_in_and_out_through_the_tokenizer():
    video = CodedVideo(Levels(), small())
    context = torch.rand(2, 3, 1, 4, 4) * 2 - 1
    rollout = Rollout(video.model, choose=Sampler(temperature=0))
    frames, state = video.generate(context, 4, rollout=rollout)
    codes, before = rollout.generate(video.encode(context), 4)
    assert_close(frames, Levels().decode(codes))
    assert_close(state, (codes[:, -1], *before))
    logits, _ = video(context)
    assert_close(logits, video.model(Levels().encode(context))[0])


def test_frames_go_on_from_a_saved_state_to_the_last_bit(tmp_path):
    """Although what was decoded need not have the codes that it was decoded from."""
    video = CodedVideo(autoencoder(), small(actions=2)).eval()
    context, actions = torch.rand(1, 2, 1, 8, 8) * 2 - 1, torch.randint(0, 2, (1, 9))

    def sampled():
        return Rollout(video.model, choose=Sampler(generator=generator()))

    whole, last = video.generate(context, 7, actions=actions, rollout=sampled())
    rollout = sampled()
    first, state = video.generate(context, 3, actions=actions[:, :5], rollout=rollout)
    torch.save(state, tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    second, state = video.generate(None, 4, actions=actions[:, 5:], state=state, rollout=rollout)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert all(torch.equal(*pair) for pair in zip(state, last, strict=True))


def test_frames_that_came_since_follow_the_state():
    video = CodedVideo(Levels(), small())
    clip = torch.rand(1, 4, 1, 4, 4) * 2 - 1
    first, state = video.generate(clip[:, :2], 1)
    rollout = Rollout(video.model, choose=Sampler(temperature=0))
    frames, _ = video.generate(clip[:, 2:], 3, state=state, rollout=rollout)
    assert_close(frames, video.generate(torch.cat([clip[:, :2], first, clip[:, 2:]], dim=1), 3, rollout=rollout)[0])


def test_a_stream_of_frames_has_no_end_and_no_gradients():
    video = CodedVideo(Levels(), small())
    sizes = set()
    for frame, state in islice(video.stream(torch.zeros(1, 2, 1, 4, 4)), 20):
        assert frame.shape == (1, 1, 4, 4) and not frame.requires_grad
        sizes.add(sum(m.untyped_storage().nbytes() for m in state))
    assert len(sizes) == 1


def test_the_tokenizer_stays_frozen():
    video = CodedVideo(autoencoder(), small()).train()
    before = {key: m.clone() for key, m in video.tokenizer.state_dict().items()}
    assert video.model.training and not any(part.training for part in video.tokenizer.modules())
    codes = video.encode(torch.rand(1, 3, 1, 8, 8) * 2 - 1)
    code_loss(video.model(codes[:, :-1])[0], codes[:, 1:]).backward()
    assert all(m.grad is None for m in video.tokenizer.parameters())
    assert all(m.grad is not None for m in video.model.stack.parameters())
    assert_close(video.tokenizer.state_dict(), before)


def test_long_clips_are_encoded_in_parts():
    class Counted(Levels):
        most = 0

        def encode(self, frames):
            self.most = max(self.most, frames.shape[0] * frames.shape[1])
            return super().encode(frames)

    video = CodedVideo(Counted(), small())
    clip = torch.rand(3, AT_ONCE, 1, 2, 2) * 2 - 1
    assert torch.equal(video.encode(clip), Levels().encode(clip))
    assert video.tokenizer.most <= AT_ONCE


def test_the_nearest_vector_is_the_code():
    book = Codebook(5, 3).double()
    z = torch.randn(40, 3, dtype=torch.float64)
    assert torch.equal(book.nearest(z), torch.cdist(z, book.vectors).argmin(dim=1))


def test_the_codebook_finds_the_clusters():
    """Four clusters, one of them with 3 % of the vectors: every one gets a code of its own."""
    centres = torch.tensor([[8.0, 0], [0, 8], [-8, 0], [0, -8]])
    book = Codebook(16, 2, decay=0.9)
    for _ in range(60):
        cluster = torch.multinomial(torch.tensor([0.6, 0.3, 0.07, 0.03]), 400, replacement=True)
        z = centres[cluster] + 0.1 * torch.randn(400, 2)
        book.learn(z, book.nearest(z))
    assert torch.cdist(centres, book.vectors).min(dim=1).values.max() < 0.3


def test_the_codebook_is_a_moving_average():
    book = Codebook(2, 1, decay=0.5)
    book.vectors.copy_(torch.tensor([[0.0], [10.0]]))
    book.usage.fill_(0.5)
    book.sums.copy_(book.vectors / 2)
    z = torch.tensor([[1.0], [1.0], [1.0], [8.0]])
    book.learn(z, book.nearest(z))
    assert_close(book.usage, torch.tensor([0.625, 0.375]))
    assert_close(book.vectors, torch.tensor([[0.375 / 0.625], [(2.5 + 1.0) / 0.375]]))


def test_processes_share_one_codebook(monkeypatch):
    """Two of them learn what one would of all vectors."""
    here, there = torch.randn(2, 60, 2)
    alone, shared = Codebook(3, 2), Codebook(3, 2)
    for book in (alone, shared):
        book.usage.fill_(1 / 3)
        book.sums.copy_(alone.vectors / 3)
    shared.vectors.copy_(alone.vectors)
    kind = nn.functional.one_hot(alone.nearest(there), 3).float()
    theirs = [kind.mean(dim=0), kind.T @ there / len(there)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda m: m.add_(theirs.pop(0)))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda m, src: None)
    shared.learn(here, shared.nearest(here))
    monkeypatch.undo()
    together = torch.cat([here, there])
    alone.learn(together, alone.nearest(together))
    assert_close((shared.usage, shared.vectors), (alone.usage, alone.vectors))


def test_gradients_go_straight_through_the_codebook():
    net = autoencoder()
    frames = torch.rand(1, 2, 1, 8, 8) * 2 - 1
    found = net(frames)
    assert found.frames.shape == frames.shape and found.codes.shape == (1, 2, 4, 4)
    found.frames.sum().backward()
    assert all(m.grad is not None and m.grad.isfinite().all() for m in net.parameters())
    assert net.encoder[0].weight.grad.any()


def test_only_training_changes_the_codebook():
    net = autoencoder()
    frames = torch.rand(1, 2, 1, 8, 8) * 2 - 1
    before = net.codebook.vectors.clone()
    net.encode(frames)
    net.eval()(frames)
    assert torch.equal(net.codebook.vectors, before)
    net.train()(frames)
    assert not torch.equal(net.codebook.vectors, before)


def test_an_autoencoder_decodes_what_it_encodes():
    net = autoencoder().eval()
    frames = torch.rand(2, 3, 1, 8, 6) * 2 - 1
    found = net(frames)
    assert torch.equal(net.encode(frames), found.codes)
    assert_close(net.decode(found.codes), found.frames)
    assert found.frames.abs().max() <= 1


def test_the_codebook_learns_in_float32_under_autocast():
    net = autoencoder(encoder=(32,), decoder=(32,))
    frames = torch.rand(1, 2, 1, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = net(frames)
        z = net.encoder(frames.flatten(0, 1)).movedim(1, -1).flatten(0, 2)
        codes = net.codebook.nearest(z)
    (found.frames.float().square().mean() + found.commitment).backward()
    assert z.dtype == torch.bfloat16 and all(m.grad.isfinite().all() for m in net.parameters())
    assert torch.equal(codes, torch.cdist(z.double(), net.codebook.vectors.double()).argmin(dim=1))
    taken = nn.functional.one_hot(codes, CODES).float()
    before, usage = net.codebook.sums.clone(), net.codebook.usage.clone()
    with torch.autocast("cpu", torch.bfloat16):
        net.codebook.learn(z.detach(), codes)
    kept = (0.99 * usage + 0.01 * taken.mean(dim=0)) > 0.1 / CODES
    wanted = 0.99 * before + 0.01 * taken.T @ z.detach().float() / len(z)
    assert kept.any()
    assert_close(net.codebook.sums[kept], wanted[kept])


def test_an_autoencoder_learns():
    """Frames of two kinds, bright left or bright right, become clear in forty steps."""
    net = autoencoder(codes=4, encoder=(32, 32), decoder=(32, 32))
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    left = torch.full((1, 1, 1, 8, 8), -1.0)
    left[..., :4] = 1
    frames = torch.cat([left, -left])
    for _ in range(40):
        found = net(frames)
        error = nn.functional.mse_loss(found.frames, frames)
        optimiser.zero_grad()
        (error + 0.25 * found.commitment).backward()
        optimiser.step()
    assert nn.functional.mse_loss(net.eval()(frames).frames, frames) < 0.1
    assert len(torch.unique(net.encode(frames))) >= 2


def test_bad_input_is_refused():
    model = small(actions=3)
    codes = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="codes must be integers"):
        model(codes.float())
    with pytest.raises(ValueError, match="codes must be integers"):
        model(codes[0])
    with pytest.raises(ValueError, match="not empty"):
        model.stream(codes[:, :0])
    with pytest.raises(ValueError, match="codes go from -1 to 11; got 12 to 12"):
        model(codes + 12)
    with pytest.raises(ValueError, match=r"must be multiples of 2; got \(3, 4\)"):
        model(codes[:, :, :3])
    with pytest.raises(ValueError, match="from 0 to 2, or -1 for unknown; got 0 to 3"):
        model(codes, torch.tensor([[0, 1, 3]] * 2))
    with pytest.raises(ValueError, match="2 layers need as many states"):
        model.generate(codes, 1, state=small(layers=1)(codes)[1])
    with pytest.raises(ValueError, match="state must have shape"):
        model.generate(codes, 1, state=small(state=6)(codes)[1])
    with pytest.raises(ValueError, match="temperature must be 0 or more"):
        Sampler(temperature=-1)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Sampler(top_k=0)
    with pytest.raises(ValueError, match="at most the 12 codes; got 13"):
        model.generate(codes, 1, choose=Sampler(top_k=13))
    with pytest.raises(ValueError, match="units must be at least 1"):
        small(decoder_units=0)
    with pytest.raises(ValueError, match="decay from 0 to below 1"):
        autoencoder(decay=1.0)
    with pytest.raises(ValueError, match="codes go from 0 to 11; got -1 to -1"):
        autoencoder().decode(codes - 1)
    with pytest.raises(ValueError, match="frames must be"):
        autoencoder().encode(torch.zeros(1, 2, 3, 8, 8))


def test_bad_video_is_refused():
    video = CodedVideo(Levels(), small(actions=2))
    clip = torch.zeros(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="must have the 7 codes of its tokenizer; got 12"):
        CodedVideo(autoencoder(codes=7), small())
    with pytest.raises(ValueError, match="frames must be"):
        video.generate(clip[:, :, 0], 1)
    with pytest.raises(ValueError, match="multiples of 2"):
        video.generate(clip[..., :3], 1)
    with pytest.raises(ValueError, match="or the state of an earlier stream"):
        video.stream()
    with pytest.raises(ValueError, match="or the state of an earlier stream"):
        video.stream(state=())
    with pytest.raises(ValueError, match="must begin with the codes of a frame"):
        video.generate(clip, 1, state=video(clip)[1])
    with pytest.raises(ValueError, match="must begin with the codes of a frame"):
        video.generate(clip[:1], 1, state=video.generate(clip, 1)[1])
    with pytest.raises(ValueError, match="2 layers need as many states"):
        video.generate(None, 1, state=video.generate(clip, 1)[1][:-1])
    with pytest.raises(ValueError, match="one for each of 5 frames, context included; got 4"):
        video.generate(clip, 2, actions=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="actions must be integers"):
        video.generate(None, 2, actions=torch.zeros(2, dtype=torch.long), state=video.generate(clip, 1)[1])
    with pytest.raises(ValueError, match="frames must be at least 1"):
        video.generate(clip, 0)
