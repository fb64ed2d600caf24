"""The yardstick: one training step of DVRL or the RNN in eager PyTorch, for comparison only.

It is what somebody would run today who takes the 2018 release as it was meant: step by step, all particles of a step
at once, the graph kept over a window of segments while RMSProp changes the weights in place under it (through
`.data`, which PyTorch's version check does not see). Sizes, losses and environments are those of the configuration;
Atari runs on the same EnvPool, through its Python interface.

Modules and parameters carry the release's names, so that its weights load directly;
`python -m benchmarks.torch_dvrl --check=tests/golden` compares losses, returns and gradients with its numbers.

Needs PyTorch (not a dependency of this project): `pip install torch`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from torch import nn

IMAGE_LAYERS = {  # (kernel, stride, padding) of the encoder's convolutions by image side.
    84: ((8, 4, 0), (4, 2, 0), (3, 1, 0)),
    32: ((4, 2, 1), (4, 2, 1), (4, 2, 0)),
    16: ((4, 2, 1), (4, 2, 1), (4, 1, 0)),
}


# --- Networks --------------------------------------------------------------------------------------------------------


def linear(inputs, outputs, batch_norm=False):
    norm = [nn.BatchNorm1d(outputs)] if batch_norm else []
    return nn.Sequential(nn.Linear(inputs, outputs), *norm, nn.ReLU())


def encoder(sizes):
    if len(sizes.obs_shape) == 1:
        a, b = sizes.channels
        return nn.Sequential(nn.Linear(sizes.obs_shape[0], a), nn.ReLU(), nn.Linear(a, b), nn.ReLU())
    layers, channels = [], sizes.obs_shape[0]
    for features, (kernel, stride, padding) in zip(sizes.channels, IMAGE_LAYERS[sizes.obs_shape[1]], strict=True):
        layers.append(nn.Conv2d(channels, features, kernel, stride, padding))
        layers += [nn.BatchNorm2d(features)] if sizes.batch_norm else []
        layers.append(nn.ReLU())
        channels = features
    return nn.Sequential(*layers)


def decoder(sizes):
    if len(sizes.obs_shape) == 1:
        return linear(sizes.channels[1], sizes.channels[0])
    layers, widths = [], (*sizes.channels[::-1], sizes.obs_shape[0])
    specs = IMAGE_LAYERS[sizes.obs_shape[1]][::-1]
    for i, (kernel, stride, padding) in enumerate(specs):
        layers.append(nn.ConvTranspose2d(widths[i], widths[i + 1], kernel, stride, padding))
        if i < 2:
            layers += [nn.BatchNorm2d(widths[i + 1])] if sizes.batch_norm else []
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Sizes:
    """Every size and coefficient of a run, from a golden file's description or from one of our configurations."""

    device = "cpu"

    def __init__(self, **fields):
        self.__dict__.update(fields)

    @property
    def discrete(self):
        return self.num_actions is not None

    @property
    def action_size(self):
        return self.num_actions if self.discrete else self.action_dim

    @property
    def encoded(self):
        if len(self.obs_shape) == 1:
            return (self.channels[-1],)
        side = self.obs_shape[1]
        for kernel, stride, padding in IMAGE_LAYERS[side]:
            side = (side + 2 * padding - kernel) // stride + 1
        return (self.channels[-1], side, side)


class Policy(nn.Module):
    """Categorical, or normal with a free log standard deviation."""

    def __init__(self, sizes):
        super().__init__()
        self.discrete = sizes.discrete
        if self.discrete:
            self.linear = nn.Linear(sizes.h_dim, sizes.num_actions)
        else:
            self.fc_mean = nn.Linear(sizes.h_dim, sizes.action_dim)
            self.logstd = nn.Module()
            self.logstd._bias = nn.Parameter(torch.zeros(sizes.action_dim, 1))

    def forward(self, x, action=None):
        """Returns (action, its log probability [B], the entropy [B])."""
        if self.discrete:
            log_probs = F.log_softmax(self.linear(x), -1)
            probs = log_probs.exp()
            action = torch.multinomial(probs.detach(), 1) if action is None else action
            return action, log_probs.gather(-1, action)[:, 0], -(log_probs * probs).sum(-1)
        # Arguments are not checked, as by PyTorch of 2018: each check would wait for the GPU.
        normal = torch.distributions.Normal(self.fc_mean(x), self.logstd._bias.t().exp(), validate_args=False)
        action = normal.sample() if action is None else action
        return action, normal.log_prob(action).sum(-1), normal.entropy().sum(-1).expand(len(x))


class Agent(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.critic_linear = nn.Linear(sizes.h_dim, 1)
        self.dist = Policy(sizes)
        self.encoding_bn = nn.BatchNorm1d(sizes.h_dim)

    def heads(self, features, action=None):
        """Returns (value [B], action, log probability [B], entropy [B])."""
        if self.sizes.batch_norm:
            features = self.encoding_bn(features)
        return self.critic_linear(features)[:, 0], *self.dist(features, action)


class RNN(Agent):
    def __init__(self, sizes):
        super().__init__(sizes)
        inputs = int(np.prod(sizes.encoded))
        self.encoder = encoder(sizes)
        self.action_encoder = linear(sizes.action_size, sizes.action_encoding, sizes.batch_norm)
        self.gru = nn.GRUCell(inputs + sizes.action_encoding, sizes.h_dim)

    def initial(self, num_envs):
        return {"h": torch.zeros(num_envs, self.sizes.h_dim, device=self.sizes.device)}

    def draw(self, num_envs):
        return None

    def forward(self, belief, obs, prev_action, draws=None):
        """Returns (belief, what actor and critic see [B, H], -ELBO [B])."""
        del draws
        phi = torch.cat([self.encoder(obs).flatten(1), self.action_encoder(prev_action)], -1)
        h = self.gru(phi, belief["h"])
        return {"h": h}, h, torch.zeros(len(obs), device=obs.device)


def normal_log_prob(x, mean, var):
    return -0.5 * ((x - mean) ** 2 / var + var.log() + np.log(2 * np.pi)).sum(-1)


class DVRL(Agent):
    def __init__(self, sizes):
        super().__init__(sizes)
        h, z, a, norm = sizes.h_dim, sizes.z_dim, sizes.action_encoding, sizes.batch_norm
        x = int(np.prod(sizes.encoded))
        part = lambda **layers: nn.ModuleDict(layers)
        positive = lambda: nn.Sequential(nn.Linear(h, z), nn.Softplus())
        self.encoding_network = part(phi_x=encoder(sizes), action_encoder=linear(sizes.action_size, a, norm))
        self.proposal_network = part(enc=linear(x + h + a, h, norm), enc_mean=nn.Linear(h, z), enc_std=positive())
        self.transition_network = part(prior=linear(h + a, h), prior_mean=nn.Linear(h, z), prior_std=positive())
        self.deterministic_transition_network = part(phi_z=linear(z, h), rnn=nn.GRUCell(x + h + a, h))
        self.emission_network = part(linear_obs_decoder=linear(h + h + a, x, norm), dec=decoder(sizes))
        if len(sizes.obs_shape) == 1:
            (size,), width = sizes.obs_shape, sizes.channels[0]
            self.emission_network["dec_mean"] = nn.Linear(width, size)
            self.emission_network["dec_std"] = nn.Sequential(nn.Linear(width, size), nn.Softplus())
        if sizes.num_particles > 1:
            self.particle_gru = nn.GRU(h + h + 1, h, batch_first=True)
        else:
            self.particle_gru = nn.Linear(h + h + 1, h)

    def initial(self, num_envs):
        k, s = self.sizes.num_particles, self.sizes
        zeros = lambda *size: torch.zeros(num_envs, k, *size, device=s.device)
        return {"h": zeros(s.h_dim), "log_weight": zeros()}

    def draw(self, num_envs):
        s = self.sizes
        eps = torch.randn(num_envs, s.num_particles, s.z_dim, device=s.device)
        return torch.rand(num_envs, 1, device=s.device), eps

    def resample(self, belief, u):
        k = self.sizes.num_particles
        cumulative = F.softmax(belief["log_weight"].detach(), -1).cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        positions = ((u + torch.arange(k, device=u.device)) / k).clamp(max=1 - 1e-7)
        ancestors = torch.searchsorted(cumulative, positions, right=True)
        return belief["h"].gather(1, ancestors[..., None].expand(-1, -1, self.sizes.h_dim))

    def forward(self, belief, obs, prev_action, draws):
        """Returns (belief, what actor and critic see [B, H], -ELBO [B])."""
        batch, k = len(obs), self.sizes.num_particles
        u, eps = draws
        h_prev = (self.resample(belief, u) if self.sizes.encoding_loss_coef > 0 else belief["h"]).flatten(0, 1)
        each = lambda x: x[:, None].expand(-1, k, -1).flatten(0, 1)
        phi_o = each(self.encoding_network["phi_x"](obs).flatten(1))
        phi_a = each(self.encoding_network["action_encoder"](prev_action))
        q, p, e = self.proposal_network, self.transition_network, self.emission_network
        hidden = q["enc"](torch.cat([phi_o, h_prev, phi_a], -1))
        q_mean, q_var = q["enc_mean"](hidden), q["enc_std"](hidden)
        z = q_mean + q_var.sqrt() * eps.flatten(0, 1)
        phi_z = self.deterministic_transition_network["phi_z"](z)
        h = self.deterministic_transition_network["rnn"](torch.cat([phi_o, phi_z, phi_a], -1), h_prev)
        hidden = p["prior"](torch.cat([h_prev, phi_a], -1))
        p_mean, p_var = p["prior_mean"](hidden), p["prior_std"](hidden)
        decoded = e["linear_obs_decoder"](torch.cat([phi_z, h_prev, phi_a], -1))
        target = each(obs.flatten(1))
        if len(self.sizes.obs_shape) == 3:
            logits = e["dec"](decoded.unflatten(1, self.sizes.encoded)).flatten(1)
            emission = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        else:
            decoded = e["dec"](decoded)
            emission = normal_log_prob(target, e["dec_mean"](decoded), e["dec_std"](decoded))
        log_weight = (normal_log_prob(z, p_mean, p_var) - normal_log_prob(z, q_mean, q_var) + emission).view(batch, k)
        encoding_loss = np.log(k) - log_weight.logsumexp(-1)
        weight = F.softmax(log_weight, -1)[..., None]
        particles = torch.cat([h.view(batch, k, -1), phi_z.view(batch, k, -1), weight], -1)
        features = self.particle_gru(particles)[1][0] if k > 1 else self.particle_gru(particles)[:, 0]
        return {"h": h.view(batch, k, -1), "log_weight": log_weight}, features, encoding_loss


def make_agent(sizes):
    return (DVRL if sizes.algorithm == "dvrl" else RNN)(sizes)


# --- Training --------------------------------------------------------------------------------------------------------


def restart(belief, not_done):
    return {name: x * not_done.view(-1, *[1] * (x.ndim - 1)) for name, x in belief.items()}


def segment_loss(agent, steps, rewards, not_dones, valids, bootstrap):
    """A2C losses of one segment: (total, value, action, entropy, encoding), and the returns [T, B]."""
    s = agent.sizes
    returns, following = [], bootstrap
    for reward, not_done in zip(reversed(rewards), reversed(not_dones), strict=True):
        following = reward + s.gamma * not_done * following
        returns.append(following)
    returns = torch.stack(returns[::-1])
    value, log_prob, entropy, encoding = (torch.stack(x) for x in zip(*steps, strict=True))
    mask = torch.stack(valids)
    mean = lambda x: (x * mask).sum() / mask.sum()
    advantage = returns - value
    losses = mean(advantage**2), -mean(advantage.detach() * log_prob), mean(entropy), mean(encoding)
    total = s.value_loss_coef * losses[0] + losses[1]
    total = total - s.entropy_coef * losses[2] + s.encoding_loss_coef * losses[3]
    return (total, *losses), returns


class Trainer:
    """Updates of one run; `update()` acts for a segment and changes the weights once."""

    def __init__(self, sizes, env, learning_rate, num_steps, window):
        self.agent, self.env = make_agent(sizes).to(sizes.device), env
        self.num_steps, self.window = num_steps, window
        self.params = list(self.agent.parameters())
        # The optimiser works on aliases: in-place changes through them are not seen by the graph's version check.
        self.aliases = [nn.Parameter(p.data) for p in self.params]
        self.optimizer = torch.optim.RMSprop(self.aliases, lr=learning_rate, alpha=0.99, eps=1e-5)
        self.belief = self.agent.initial(env.num_envs)
        self.obs, self.prev_action = env.reset(), env.first_action()
        self.updates = 0

    def update(self):
        s, env = self.agent.sizes, self.env
        if self.updates % self.window == 0:
            self.belief = {name: x.detach() for name, x in self.belief.items()}
        steps, rewards, not_dones, valids = [], [], [], []
        for _ in range(self.num_steps):
            draws = self.agent.draw(env.num_envs)
            self.belief, features, encoding_loss = self.agent(self.belief, self.obs, self.prev_action, draws)
            value, action, log_prob, entropy = self.agent.heads(features)
            self.obs, reward, not_done, keep, valid = env.step(action.detach())
            self.belief = restart(self.belief, keep)
            encoded = F.one_hot(action[:, 0], s.num_actions).float() if s.discrete else action
            self.prev_action = torch.where(keep[:, None] > 0, encoded, env.first_action())
            steps.append((value, log_prob, entropy, encoding_loss))
            rewards.append(reward)
            not_dones.append(not_done)
            valids.append(valid)
        with torch.no_grad():
            _, features, _ = self.agent(self.belief, self.obs, self.prev_action, self.agent.draw(env.num_envs))
            bootstrap = self.agent.heads(features)[0]
        losses, _ = segment_loss(self.agent, steps, rewards, not_dones, valids, bootstrap)
        for param in self.params:
            param.grad = None
        self.updates += 1
        losses[0].backward(retain_graph=self.updates % self.window != 0)
        for param, alias in zip(self.params, self.aliases, strict=True):
            alias.grad = param.grad
        torch.nn.utils.clip_grad_norm_([a for a in self.aliases if a.grad is not None], 0.5)
        self.optimizer.step()
        return [float(x.detach()) for x in losses]


# --- Environments ----------------------------------------------------------------------------------------------------


class Atari:
    """Flickering games on EnvPool's Python interface; the call after a `done` is not valid."""

    def __init__(self, config, device):
        from dvrl_jax.envs.atari import make_pool

        self.num_envs, self.p_blank, self.device = config.num_envs, config.env.p_blank, device
        self.pool = make_pool(
            config.env.name, config.num_envs, config.seed, config.env.frame_skip, config.env.first_core
        )
        self.num_actions, self.action_dim = int(self.pool.action_space.n), None
        self.obs_shape = (1, 84, 84)
        self.was_done = np.zeros(self.num_envs, bool)

    def first_action(self):
        noop = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return F.one_hot(noop, self.num_actions).float()

    def reset(self):
        return self._observe(self.pool.reset()[0])

    def _observe(self, frames):
        seen = (torch.rand(self.num_envs, device=self.device) >= self.p_blank).float().view(-1, 1, 1, 1)
        return self._send(frames).float() / 255 * seen

    def _send(self, x):
        return torch.from_numpy(x).to(self.device)

    def step(self, action):
        """Returns (obs, reward [B], not_done [B], keep [B]: belief goes on, valid [B])."""
        frames, reward, terminated, truncated, _ = self.pool.step(action[:, 0].cpu().numpy().astype(np.int32))
        late, done = self.was_done, terminated | truncated
        self.was_done = done
        number = lambda x: self._send(np.asarray(x, np.float32))
        reward = np.where(late, 0, reward)
        return self._observe(frames), number(reward), number(~(done & ~late)), number(~(done | late)), number(~late)


class MountainHike:
    """Mountain Hike on PyTorch tensors, all environments at once."""

    num_actions, action_dim, obs_shape = None, 2, (2,)

    def __init__(self, config, device):
        self.num_envs, self.std, self.device = config.num_envs, config.env.observation_std, device
        ridge = [(0.5, 0.5, 0.75, 0.1, 1.0), (0.0, 0.2, 0.1, 0.75, 0.8), (-0.375, -0.5, 0.75, 0.1, 0.55)]
        self.ridge = torch.tensor(ridge, device=device)

    def first_action(self):
        return torch.zeros(self.num_envs, 2, device=self.device)

    def noise(self):
        return torch.randn(self.num_envs, 2, device=self.device)

    def start(self):
        return -0.85 + 0.1 * self.noise()

    def observe(self):
        return 10 * (self.position + self.std * self.noise())

    def reset(self):
        self.position, self.time = self.start(), 0
        return self.observe()

    def step(self, action):
        length = action.norm(dim=-1, keepdim=True)
        move = action * (0.05 / length.clamp(min=0.05))
        self.position = self.position + move + 0.025 * self.noise()
        mean, std, factor = self.ridge[:, :2], self.ridge[:, 2:4], self.ridge[:, 4]
        deviation = (self.position[:, None] - mean) / std
        density = torch.exp(-0.5 * (deviation**2).sum(-1)) / (2 * np.pi * std.prod(-1))
        height = (factor * density / 3).max(-1).values
        reward = 4 * (1 - (1 - height) ** 4) - 4.5 + self.position.sum(-1) / 4
        reward = torch.where((self.position.abs() <= 1).all(-1), reward, -6.0) - 0.1 * length[:, 0]
        self.time += 1
        done = self.time == 75
        ones = torch.ones(self.num_envs, device=self.device)
        not_done = ones * (not done)
        if done:
            self.position, self.time = self.start(), 0
        return self.observe(), reward, not_done, not_done, ones


def make_trainer(config, device: str = "cpu") -> Trainer:
    """The peer of one of our configurations, on one of PyTorch's devices."""
    env = (MountainHike if config.env.name == "MountainHike" else Atari)(config, device)
    m, c = config.model, config.loss
    sizes = Sizes(
        device=device,
        algorithm=config.algorithm,
        obs_shape=env.obs_shape,
        num_particles=m.num_particles,
        num_actions=env.num_actions,
        action_dim=env.action_dim,
        h_dim=m.h_dim,
        z_dim=m.z_dim,
        action_encoding=m.action_encoding,
        channels=m.channels,
        batch_norm=m.batch_norm,
        gamma=c.gamma,
        value_loss_coef=c.value_coef,
        entropy_coef=c.entropy_coef,
        encoding_loss_coef=c.encoding_coef,
    )
    return Trainer(sizes, env, config.optimizer.learning_rate, config.num_steps, config.bptt_segments)


# --- Agreement with the release's numbers ----------------------------------------------------------------------------


def check(path: Path) -> float:
    """Largest deviation of losses, returns and gradient norms from a golden file, relative to each array's scale."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    tensor = lambda name, t=...: torch.from_numpy(np.ascontiguousarray(data[name][t]))
    sizes = Sizes(**json.loads(str(data["config"])))
    agent = make_agent(sizes)
    params = {name[6:]: tensor(name) for name in data if name.startswith("param/")}
    own = agent.state_dict()
    agent.load_state_dict({name: x for name, x in params.items() if name in own}, strict=False)
    belief, worst = agent.initial(sizes.num_envs), 0.0

    def compare(actual, expected, allowance=0.0):
        nonlocal worst
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        error = max(np.max(np.abs(actual - expected)) - allowance, 0) / max(np.max(np.abs(expected)), 1e-8)
        worst = max(worst, float(error))

    for segment in range(2):
        steps, rewards, not_dones = [], [], []
        for t in range(segment * sizes.num_steps, (segment + 1) * sizes.num_steps):
            draws = (tensor("u", t), tensor("eps_z", t)) if sizes.algorithm == "dvrl" else None
            belief, features, encoding = agent(belief, tensor("obs", t), tensor("prev_action", t), draws)
            value, _, log_prob, entropy = agent.heads(features, tensor("action", t))
            compare(value.detach()[:, None], data["value"][t])
            compare(belief["h"].detach(), data["h"][t])
            belief = restart(belief, tensor("not_done", t))
            steps.append((value, log_prob, entropy, encoding))
            rewards.append(tensor("reward", t))
            not_dones.append(tensor("not_done", t))
        bootstrap = tensor(f"bootstrap{segment}/value")[:, 0]
        ones = [torch.ones(sizes.num_envs)] * sizes.num_steps
        losses, returns = segment_loss(agent, steps, rewards, not_dones, ones, bootstrap)
        compare(returns[..., None], data[f"segment{segment}/returns"])
        compare([float(x.detach()) for x in losses], data[f"segment{segment}/loss"])
        agent.zero_grad()
        losses[0].backward(retain_graph=True)
        for name, param in agent.named_parameters():
            expected = data.get(f"segment{segment}/grad/{name}")
            if expected is not None and param.grad is not None:
                compare(param.grad, expected, allowance=1e-6 * float(data[f"segment{segment}/grad_norm"]))
    return worst


FLAGS = flags.FLAGS


def main(argv) -> None:
    del argv
    for path in sorted(Path(FLAGS.check).glob("*.npz")):
        print(f"{path.name}: largest relative deviation {check(path):.1e}")


if __name__ == "__main__":
    flags.DEFINE_string("check", "tests/golden", "folder of reference numbers to compare with")
    app.run(main)
