"""Plots metrics of runs: python plot.py --id 3,4,5 [--metric result.true,loss.encoding] [--out plots/comparison]"""

from dvrl_jax.commands import plot

if __name__ == "__main__":
    plot.run()
