"""Runs the paper's experiments: python reproduce.py [--list] [--only=hike,atari/Pong] [--seeds=5] [--steps=N]"""

from dvrl_jax.commands import reproduce

if __name__ == "__main__":
    reproduce.run()
