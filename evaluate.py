"""Plays whole games with a trained agent: python evaluate.py --workdir=saved_runs/3 [--video=out.mp4]"""

from dvrl_jax.commands import evaluate

if __name__ == "__main__":
    evaluate.run()
