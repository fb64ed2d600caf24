"""Trains an agent: python train.py --config=configs/pong_dvrl.py [--workdir=DIR] [--config.group.field=value ...]"""

from dvrl_jax.commands import train

if __name__ == "__main__":
    train.run()
