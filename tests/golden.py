"""Golden files as an environment, an agent and training pieces: see tests/golden/README.md."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import default
from dvrl_jax import acting
from dvrl_jax.agents import particles
from dvrl_jax.agents.original_weights import from_original
from dvrl_jax.envs import ActionSpec, BatchedEnvironment, EnvState, ObservationSpec
from dvrl_jax.learner import make_learner


class Recording(BatchedEnvironment):
    """Plays back recorded observations [N+1, B, ...], rewards and ends [N, B]; `EnvState.inner` is the step."""

    restorable = True

    def __init__(self, obs, reward, done, action: ActionSpec):
        self.obs, self.reward, self.done = jnp.asarray(obs), jnp.asarray(reward), jnp.asarray(done)
        self.num_envs = self.obs.shape[1]
        image = self.obs.ndim == 5  # Grey values in 0..1.
        self.observation = ObservationSpec(self.obs.shape[2:], self.obs.dtype, "bernoulli" if image else None)
        self.action = action

    def reset(self, key):
        return EnvState.begin(jnp.zeros((), jnp.int32), self.obs[0])

    def step(self, state, action):
        t = state.inner
        return EnvState.go_on(t + 1, self.obs[t + 1], self.reward[t], self.done[t])


class Golden:
    """One golden file, with everything needed to compute its numbers again.

    `use` are the choices of its learner. In `dtype` float64 (under `jax.enable_x64`) the same numbers are computed in
    double precision.
    """

    def __init__(self, path: Path, dtype=np.float32, use=None):
        self.dtype = dtype
        with np.load(path) as file:
            self.data = {name: file[name] for name in file.files}
        for name, array in self.data.items():
            if array.dtype == np.float32:
                self.data[name] = array.astype(dtype)
        self.sizes = json.loads(str(self.data["config"]))
        self.is_dvrl = self.sizes["algorithm"] == "dvrl"
        self.is_image = len(self.sizes["obs_shape"]) == 3
        obs = self.data["obs"]
        if self.is_image:
            obs = np.moveaxis(obs, 2, -1)
        discrete = self.sizes["num_actions"] is not None
        action = ActionSpec(discrete, self.sizes["num_actions"] if discrete else self.sizes["action_dim"])
        self.env = Recording(obs, self.data["reward"], self.data["not_done"] == 0, action)
        self.config = self._config()
        self.learner = make_learner(self.config, self.env, use)
        self.agent = acting.make_agent(self.config, self.env, jax.random.PRNGKey(0))
        nnx.update(self.agent, jax.tree.map(lambda x: x.astype(dtype), nnx.state(self.agent)))
        from_original(self.agent, self.params("param/"))

    def _config(self):
        sizes, c = self.sizes, default.get_config()
        c.algorithm = sizes["algorithm"]
        c.num_steps, c.bptt_segments = sizes["num_steps"], 2
        c.model.channels = tuple(sizes["channels"])
        c.model.h_dim, c.model.z_dim = sizes["h_dim"], sizes["z_dim"]
        c.model.action_encoding = sizes["action_encoding"]
        c.model.num_particles = sizes["num_particles"]
        c.model.batch_norm = c.model.policy_batch_norm = sizes["batch_norm"]
        c.model.obs_loss_coef = sizes["rnn_obs_loss_coef"]
        c.model.resample = sizes["encoding_loss_coef"] > 0
        c.loss.gamma, c.loss.value_coef = sizes["gamma"], sizes["value_loss_coef"]
        c.loss.entropy_coef, c.loss.encoding_coef = sizes["entropy_coef"], sizes["encoding_loss_coef"]
        return c

    def params(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under the original's parameter names, for example weights or gradients."""
        return {name[len(prefix) :]: array for name, array in self.data.items() if name.startswith(prefix)}

    def state(self):
        """A training state with the file's weights, before its first observation."""
        state = self.learner.init(jax.random.PRNGKey(0))
        _, params, batch_stats = nnx.split(self.agent, nnx.Param, nnx.BatchStat)
        return state._replace(params=params, batch_stats=batch_stats)

    def draws(self, segment: int) -> acting.Draws:
        """The recorded draws and actions of a segment."""
        num_steps = self.sizes["num_steps"]
        steps = slice(segment * num_steps, (segment + 1) * num_steps)
        keys = jax.random.split(jax.random.PRNGKey(0), num_steps)
        action = jnp.asarray(self.data["action"][steps])
        if self.env.action.discrete:
            action = action[..., 0].astype(jnp.int32)
        return acting.Draws(self._belief_draws(segment, steps) if self.is_dvrl else (), keys, action)

    def _belief_draws(self, segment, steps):
        u = np.concatenate([self.data["u"][steps], self.data[f"bootstrap{segment}/u"][None]])
        eps = np.concatenate([self.data["eps_z"][steps], self.data[f"bootstrap{segment}/eps_z"][None]])
        return particles.Noise(jnp.asarray(u[..., 0]), jnp.asarray(eps))
