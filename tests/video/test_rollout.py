"""Rollouts: compiled steps, and what they share."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.layers.convs5 import ConvSSM
from vision_ssm.video import CapturedStep, NextFrame, Rollout, convs5_stack


def small(**options):
    stack = convs5_stack(4, state=4, layers=1, groups=2)
    return NextFrame(stack, dim=4, **{"encoder": (32,), "decoder": (32,), **options})


def test_a_compiled_step_generates_the_same_in_one_graph():
    """Without a break in it, and compiled once for all frames."""
    model = small(actions=3)
    context, actions = torch.rand(1, 2, 1, 4, 4) * 2 - 1, torch.tensor([[0, 2, -1, 1, 2, 0, 1]])
    wanted, state = model.generate(context, 5, actions=actions)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    rollout = Rollout(model, accelerate=partial(torch.compile, backend=backend, fullgraph=True))
    frames, last = rollout.generate(context, 5, actions=actions)
    assert_close(frames, wanted)
    assert_close(last, state)
    assert_close(rollout.generate(context, 5, actions=actions)[0], wanted)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert not [name for name in called if "exp" in name and "expand" not in name]  # nothing is discretised


@pytest.mark.slow
def test_inductor_generates_the_same():
    model = small()
    context = torch.rand(1, 2, 1, 4, 4) * 2 - 1
    rollout = Rollout(model, accelerate=partial(torch.compile, fullgraph=True))
    assert_close(rollout.generate(context, 4), model.generate(context, 4), rtol=1e-4, atol=1e-5)


def test_a_rollout_leaves_the_model_as_it_is_and_is_of_its_weights_then():
    model = small()
    context = torch.rand(1, 2, 1, 4, 4) * 2 - 1
    rollout = Rollout(model)
    before, _ = rollout.generate(context, 2)
    ssm = model.stack.layers[0].mixer.ssm
    assert isinstance(ssm, ConvSSM) and all(m.requires_grad for m in model.parameters())
    with torch.no_grad():
        ssm.log_step += 1
    assert_close(rollout.generate(context, 2)[0], before)
    assert not torch.allclose(Rollout(model).generate(context, 2)[0], before)


def test_a_captured_step_is_for_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph needs all tensors on a GPU"):
        Rollout(small(), accelerate=CapturedStep).generate(torch.zeros(1, 2, 1, 4, 4), 2)


def test_a_captured_step_takes_what_it_is_given_and_overwrites_nothing():
    """Around its graph, whose part is played by the step itself, written over the outputs of the capture."""

    def step(frame, action, state):
        return frame + action[:, None], (2 * state[0],)

    class Graph:
        def replay(self):
            frame, state, action = captured.inputs
            for held, m in zip(captured.outputs, (frame + action[:, None], 2 * state), strict=True):
                held.copy_(m)

    captured = CapturedStep(step)
    captured.graph, captured.inputs = Graph(), [torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, dtype=torch.long)]
    captured.outputs = [torch.zeros(2, 3), torch.zeros(4)]
    action, found = torch.tensor([1, 5]), []
    frame, state = torch.ones(2, 3), (torch.ones(4),)
    for _ in range(3):
        wanted = step(frame, action, state)
        frame, state = captured(frame, action, state)
        assert_close((frame, state), wanted)
        found.append((frame, state))
    assert_close(found[0], (torch.tensor([[2.0] * 3, [6.0] * 3]), (torch.full((4,), 2.0),)))
    with pytest.raises(ValueError, match="captured for tensors"):
        captured(frame[:1], action[:1], state)
    with pytest.raises(ValueError, match="captured for tensors"):
        captured(frame, None, state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_generates_the_same():
    model = small(actions=2).cuda()
    context, actions = torch.rand(1, 2, 1, 4, 4, device="cuda"), torch.randint(0, 2, (1, 8), device="cuda")
    rollout = Rollout(model, accelerate=CapturedStep)
    wanted = model.generate(context, 6, actions=actions)
    assert_close(rollout.generate(context, 6, actions=actions), wanted)
    kept = [state for _, state in rollout.stream(context, actions=actions)]
    assert_close(kept[-1], wanted[1])
    assert not torch.equal(kept[1][0], kept[2][0])  # what was returned is not overwritten
    with pytest.raises(ValueError, match="captured for tensors"):
        rollout.generate(context.expand(2, -1, -1, -1, -1), 2, actions=actions[:, :4].expand(2, -1))
