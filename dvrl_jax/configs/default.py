"""The settings shared by all configurations. The other files in this folder change a few of these fields each.

A file for several tasks and agents takes them as its argument, `--config=FILE:<task>,<agent>`; without an agent it is
DVRL.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration: DVRL's baseline settings, without an environment's own."""
    c = ConfigDict()
    c.algorithm = "rnn"  # Belief model: "dvrl" (particles) or "rnn" (baseline).
    c.seed = 0  # Fixes all randomness: weights, environments, draws.
    c.total_env_steps = 50_000_000  # Length of training in transitions, over all environments.
    c.num_envs = 16  # Environments stepped together.
    c.num_steps = 5  # Environment steps per update (one segment).
    c.bptt_segments = 5  # Segments that gradients may cross (one window).
    c.max_skipped_updates = 100  # Training stops after so many updates in a row that were skipped for NaN or inf.

    c.env = ConfigDict()
    c.env.name = "MountainHike"  # "MountainHike", "gymnax/<id>" or an Atari game, such as "Pong".
    c.env.p_blank = 0.0  # Probability that an observation is replaced by zeros.
    c.env.frame_skip = 4  # Emulator frames per step (Atari).
    c.env.first_core = -1  # Emulator threads are tied to a core each, from this one on (Atari); -1 ties none.
    c.env.observation_std = 0.0  # Noise of a position reading in box units (Mountain Hike).
    c.env.params = ConfigDict()  # Parameters of a Gymnax environment, such as params.memory_length.

    c.model = ConfigDict()
    c.model.channels = (64, 64)  # Encoder widths: 3 convolutions for images, 2 layers for vectors.
    c.model.h_dim = 256  # Size of the recurrent state h.
    c.model.z_dim = 256  # Size of the stochastic state z (DVRL).
    c.model.action_encoding = 128  # Size of the encoded previous action; 0 leaves it out.
    c.model.num_particles = 10  # Particles per environment (DVRL).
    c.model.batch_norm = False  # Batch normalisation in encoder, proposal and decoder.
    c.model.policy_batch_norm = False  # Batch normalisation of what actor and critic see.
    c.model.detach_encoder = False  # Train the belief by the ELBO alone.
    c.model.resample = True  # Resample particles (always off when loss.encoding_coef is 0).
    c.model.obs_loss_coef = 0.0  # Observation prediction loss (RNN); loss.encoding_coef weighs it too.

    c.loss = ConfigDict()
    c.loss.gamma = 0.99  # Discount per environment step.
    c.loss.reward_scale = 1.0  # Rewards are multiplied by this before anything is learned from them.
    c.loss.bootstrap_truncated = False  # Whether a time limit's last value stands in the return (docs/method.md).
    c.loss.value_coef = 0.5  # Weight of the value loss.
    c.loss.action_coef = 1.0  # Weight of the policy gradient loss.
    c.loss.entropy_coef = 0.01  # Weight of the entropy bonus.
    c.loss.encoding_coef = 0.0  # Weight of the encoding loss (-ELBO; for an RNN its observation loss).

    c.optimizer = ConfigDict()
    c.optimizer.name = "rmsprop"  # "rmsprop" or "adam".
    c.optimizer.learning_rate = 3e-4  # Step size.
    c.optimizer.alpha = 0.99  # Decay of RMSProp's squared-gradient average.
    c.optimizer.betas = (0.9, 0.999)  # Adam's decays.
    c.optimizer.eps = 1e-5  # Added to the root of the squared-gradient average.
    c.optimizer.max_grad_norm = 0.5  # Global gradient norm is clipped to this.

    c.log = ConfigDict()
    c.log.interval = 1000  # Updates per metrics line.
    c.log.tensorboard = True  # Also write the metrics as TensorBoard event files.
    c.log.wandb = False  # Also send them to Weights & Biases (needs the extra "wandb").
    c.log.save_reconstruction_interval = 0  # Updates between saved reconstructions and predictions; 0 saves none.
    c.log.predicted_times = (0, 1, 2, 3, 4, 5, 10)  # How many steps ahead those predict; 0 is the reconstruction.

    c.checkpoint = ConfigDict()
    c.checkpoint.interval = 10_000  # Updates between checkpoints; 0 leaves it to the next field.
    c.checkpoint.minutes = 30.0  # A checkpoint is also saved if there was none for so long; 0 leaves it to the other.
    c.checkpoint.keep = 3  # How many of the latest checkpoints to keep (the best is kept besides).
    return c


def task_and_agent(argument: str) -> tuple[str, str]:
    """The task and the agent of a file's argument `<task>,<agent>`."""
    task, _, agent = argument.partition(",")
    return task, agent or "dvrl"


def with_agent(c: ConfigDict, agent: str) -> ConfigDict:
    """Sets the belief model (`algorithm`) and the weight of the loss that trains it."""
    c.algorithm = agent
    c.loss.encoding_coef = 0.1 if agent == "dvrl" else 0.0
    return c
