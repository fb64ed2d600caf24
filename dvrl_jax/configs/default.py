"""The settings shared by all configurations. The other files in this folder change a few of these fields each.

A file for several tasks and agents takes them as its argument, `--config=FILE:<task>,<agent>`; without an agent it is
DVRL.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration: DVRL's baseline settings, without an environment's own."""
    c = ConfigDict()
    c.algorithm = "rnn"  # Belief model: "dvrl", "dpfrl" (particles), "rnn", "lru" (recurrent), "memoryless" (control).
    c.seed = 0  # Fixes all randomness: weights, environments, draws.
    c.num_seeds = 1  # Seeds trained in one program: `seed`, `seed` + 1, ...
    c.num_devices = 1  # Devices that share the environments of a single seed; several seeds are shared among all.
    c.total_env_steps = 50_000_000  # Length of training in transitions, over all environments.
    c.num_envs = 16  # Environments stepped together.
    c.num_steps = 5  # Environment steps per update (one segment).
    c.bptt_segments = 5  # Segments that gradients may cross (one window).
    c.max_skipped_updates = 100  # Training stops after so many updates in a row that were skipped for NaN or inf.

    _add_env(c)

    c.model = ConfigDict()
    c.model.channels = (64, 64)  # Encoder widths: 3 convolutions for images, 2 layers for vectors.
    c.model.h_dim = 256  # Size of the recurrent state h.
    c.model.z_dim = 256  # Size of the stochastic state z (DVRL).
    c.model.action_encoding = 128  # Size of the encoded previous action; 0 leaves it out.
    c.model.reward_input = False  # Whether the previous reward is encoded with the previous action.
    c.model.num_particles = 10  # Particles per environment (DVRL).
    c.model.update_gate_bias = 0.0  # Of the recurrent GRU at first: with log(T) it remembers for about T steps.
    c.model.batch_norm = False  # Batch normalisation in encoder, proposal and decoder.
    c.model.policy_batch_norm = False  # Batch normalisation of what actor and critic see.
    c.model.detach_encoder = False  # Train the belief by the ELBO alone.
    c.model.resample = True  # Resample particles (always off when loss.encoding_coef is 0).
    c.model.resampling = "systematic"  # Or "stratified", "multinomial", "residual", "soft", "none" (docs/beliefs.md).
    c.model.resample_below = 1.0  # Resample below this share of the particles in effective sample size; 1: always.
    c.model.soft_alpha = 0.5  # Soft resampling is by this share of the weights and a uniform rest.
    c.model.summary = "gru"  # Particles for actor and critic: "gru", "mean", "mgf", "attention" (docs/beliefs.md).
    c.model.min_emission_std = 0.0  # Least standard deviation of a normal emission (docs/beliefs.md).
    c.model.obs_loss_coef = 0.0  # Observation prediction loss (RNN); loss.encoding_coef weighs it too.

    c.loss = ConfigDict()
    c.loss.gamma = 0.99  # Discount per environment step.
    c.loss.reward_scale = 1.0  # Rewards are multiplied by this before anything is learned from them.
    c.loss.bootstrap_truncated = False  # Whether a time limit's last value stands in the return (docs/method.md).
    c.loss.value_coef = 0.5  # Weight of the value loss.
    c.loss.action_coef = 1.0  # Weight of the policy gradient loss.
    c.loss.entropy_coef = 0.01  # Weight of the entropy bonus.
    c.loss.encoding_coef = 0.0  # Weight of the encoding loss (-ELBO; for an RNN its observation loss).
    c.loss.lambda_discrepancy_coef = 0.0  # Weight of the lambda-discrepancy; above 0 there is a second value head.
    c.loss.second_value_coef = 0.5  # Weight of the second head's value loss.
    c.loss.td_lambdas = (1.0, 0.0)  # With two value heads, the lambdas of the first one's and the second one's TD.

    c.optimizer = _optimizer()

    c.log = ConfigDict()
    c.log.interval = 1000  # Updates per metrics line.
    c.log.tensorboard = True  # Also write the metrics as TensorBoard event files.
    c.log.wandb = False  # Also send them to Weights & Biases (needs the extra "wandb").
    c.log.save_reconstruction_interval = 0  # Updates between saved reconstructions and predictions; 0 saves none.
    c.log.predicted_times = (0, 1, 2, 3, 4, 5, 10)  # How many steps ahead those predict; 0 is the reconstruction.

    c.checkpoint = _checkpoint()
    return c


def _optimizer() -> ConfigDict:
    c = ConfigDict()
    c.name = "rmsprop"  # "rmsprop" or "adam".
    c.learning_rate = 3e-4  # Step size.
    c.alpha = 0.99  # Decay of RMSProp's squared-gradient average.
    c.betas = (0.9, 0.999)  # Adam's decays.
    c.eps = 1e-5  # Added to the root of the squared-gradient average.
    c.max_grad_norm = 0.5  # Global gradient norm is clipped to this.
    return c


def _checkpoint() -> ConfigDict:
    c = ConfigDict()
    c.interval = 10_000  # Updates between checkpoints; 0 leaves it to the next field.
    c.minutes = 30.0  # A checkpoint is also saved if there was none for so long; 0 leaves it to the other.
    c.keep = 3  # How many of the latest checkpoints to keep (the best is kept besides).
    return c


def _add_env(c: ConfigDict) -> None:
    """Adds the group `env`: the task, and what of it is seen (docs/options.md has the wrappers' order)."""
    c.env = ConfigDict()
    c.env.name = "MountainHike"  # "MountainHike", "gymnax/<id>" or an Atari game, such as "Pong".
    c.env.reveal_state = False  # The state in place of the observation, if the environment can tell; a control.
    c.env.keep_components = ()  # Components of vector observations that are shown, by number; () shows all.
    c.env.obs_noise_std = 0.0  # Standard deviation of Gaussian noise on observations.
    c.env.noise_components = 0  # How many components of mere noise are appended to vector observations.
    c.env.noise_components_std = 1.0  # Their standard deviation.
    c.env.obs_delay = 0  # Observations come so many steps late.
    c.env.p_repeat = 0.0  # Probability that the observation shown before is repeated.
    c.env.p_blank = 0.0  # Probability that an observation is replaced by zeros.
    c.env.frame_skip = 4  # Emulator frames per step (Atari).
    c.env.first_core = -1  # Emulator threads are tied to a core each, from this one on (Atari); -1 ties none.
    c.env.observation_std = 0.0  # Noise of a position reading in box units (Mountain Hike).
    c.env.params = ConfigDict()  # Parameters of a Gymnax environment, such as params.memory_length.


def task_and_agent(argument: str) -> tuple[str, str]:
    """The task and the agent of a file's argument `<task>,<agent>`."""
    task, _, agent = argument.partition(",")
    return task, agent or "dvrl"


def with_agent(c: ConfigDict, agent: str) -> ConfigDict:
    """Sets the belief model (`algorithm`) and the weight of the loss that trains it."""
    c.algorithm = agent
    c.loss.encoding_coef = 0.1 if agent == "dvrl" else 0.0
    return c
