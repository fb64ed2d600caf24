"""Are gradients across a window those of weights changed in place under a graph that is kept, as the original has it?

    python -m benchmarks.in_place

Replays two segments of a recording (tests/golden), once in PyTorch and once here. Between the segments all weights
are changed by the same noise, a tenth of their size: in PyTorch in place, under the graph of the first segment. The
gradient of the second segment's loss, through both, is then compared. Needs PyTorch.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app
from flax import nnx

from benchmarks import torch_dvrl
from dvrl_jax.agents.original_weights import from_original, translate
from tests.golden import Golden

RECORDINGS = Path(__file__).parent.parent / "tests" / "golden"


def torch_gradient(golden: Golden, noise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of the second segment's loss by the original's parameter names."""
    data = golden.data
    tensor = lambda name, t=...: torch.from_numpy(np.ascontiguousarray(data[name][t]))
    sizes = torch_dvrl.Sizes(**json.loads(str(data["config"])))
    agent = torch_dvrl.make_agent(sizes)
    agent.load_state_dict({name: torch.from_numpy(x) for name, x in golden.params("param/").items()}, strict=False)
    belief = agent.initial(sizes.num_envs)

    def draws(u, eps):
        return (u, eps) if golden.is_dvrl else None

    for segment in range(2):
        steps, rewards, not_dones = [], [], []
        for t in range(segment * sizes.num_steps, (segment + 1) * sizes.num_steps):
            drawn = draws(tensor("u", t), tensor("eps_z", t)) if golden.is_dvrl else None
            belief, features, encoding = agent(belief, tensor("obs", t), tensor("prev_action", t), drawn)
            value, _, log_prob, entropy = agent.heads(features, tensor("action", t))
            belief = torch_dvrl.restart(belief, tensor("not_done", t))
            steps.append((value, log_prob, entropy, encoding))
            rewards.append(tensor("reward", t))
            not_dones.append(tensor("not_done", t))
        prefix = f"bootstrap{segment}"
        drawn = draws(tensor(f"{prefix}/u"), tensor(f"{prefix}/eps_z")) if golden.is_dvrl else None
        last = torch.from_numpy(previous_action(golden, (segment + 1) * sizes.num_steps))
        with torch.no_grad():
            _, features, _ = agent(belief, tensor("obs", (segment + 1) * sizes.num_steps), last, drawn)
            bootstrap = agent.heads(features)[0]
        valids = [torch.ones(sizes.num_envs)] * sizes.num_steps
        losses, _ = torch_dvrl.segment_loss(agent, steps, rewards, not_dones, valids, bootstrap)
        agent.zero_grad()
        losses[0].backward(retain_graph=True)
        if segment == 0:
            for name, param in agent.named_parameters():
                param.data.add_(torch.from_numpy(noise[name]))
    return {name: p.grad.numpy() for name, p in agent.named_parameters() if p.grad is not None}


def previous_action(golden: Golden, t: int) -> np.ndarray:
    """The action before observation t as a network input [B, A]: that of the step, or the first one of an episode."""
    action, size = golden.data["action"][t - 1], golden.env.action.size
    action = np.eye(size, dtype=np.float32)[action[:, 0].astype(int)] if golden.env.action.discrete else action
    first = np.asarray(golden.agent.initial_action(golden.env.num_envs))
    return np.where(golden.data["not_done"][t - 1].reshape(-1, 1) == 0, first, action).astype(np.float32)


def our_gradient(golden: Golden, noise: dict[str, np.ndarray]) -> nnx.State:
    """The same by `Learner.gradient`, the path that training takes."""
    learner, state = golden.learner, golden.state()
    gradient = jax.jit(learner.gradient)
    prev_action = jnp.asarray(golden.data["prev_action"][0])
    actor = state.actor._replace(is_first=jnp.zeros_like(state.actor.is_first), prev_action=prev_action)
    _, outcome = gradient(state.params, state.batch_stats, actor, state.window, 0, golden.draws(0))
    rollout = outcome.rollout
    window = state.window.put(rollout.segment, 0)
    changed = {name: x + noise[name] if name in noise else x for name, x in golden.params("param/").items()}
    from_original(golden.agent, changed)
    params = nnx.state(golden.agent, nnx.Param)
    return gradient(params, rollout.batch_stats, rollout.actor, window, 1, golden.draws(1))[0]


def compare(path: Path) -> float:
    """Norm of the difference of the two gradients, relative to the gradient's."""
    golden, rng = Golden(path), np.random.default_rng(0)
    noise = {
        name: (0.1 * np.mean(np.abs(x)) * rng.normal(size=x.shape)).astype(np.float32)
        for name, x in golden.params("param/").items()
    }
    expected = translate(golden.agent, torch_gradient(golden, noise), missing=0.0)
    actual = our_gradient(golden, noise)
    norm = lambda tree: np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(tree)))
    return norm(jax.tree.map(lambda a, b: a - b, actual, expected)) / norm(expected)


def main(argv) -> None:
    del argv
    for path in sorted(RECORDINGS.glob("*.npz")):
        print(f"{path.name}: relative difference of the gradients {compare(path):.1e}")


if __name__ == "__main__":
    app.run(main)
