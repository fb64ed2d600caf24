"""How speed and memory grow with environments, particles and window, each alone.

    python -m benchmarks.growth --config=configs/mountain_hike_dvrl.py --out=docs/growth

Writes `<out>.json` and `<out>.png`, and prints the table in Markdown.
"""

import json
from pathlib import Path

import matplotlib
from absl import flags

from benchmarks.throughput import machine, run_worker
from dvrl_jax.runs import command_line, markdown
from dvrl_jax.runs import config as config_lib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS

AXES = {
    "num_envs": ("environments", (8, 16, 32, 64, 128)),
    "model.num_particles": ("particles", (1, 5, 10, 30, 60)),
    "bptt_segments": ("segments in a window", (1, 2, 5, 10, 20)),
}


def measure(config, seconds: float) -> dict[str, list[dict[str, float]]]:
    """For each axis a list of {value, ms, steps_per_second, memory_mb}, all else as configured."""
    found = {}
    for field, (_, values) in AXES.items():
        found[field] = []
        for value in values:
            changed = config_lib.merge(config_lib.flatten(config) | {field: value})
            result = run_worker(changed, "ours", {}, {"seconds": seconds})
            names = ("ms", "steps_per_second", "memory_mb", "compile")
            found[field].append({"value": value} | {name: result[name] for name in names})
    return found


def as_table(found: dict[str, list[dict[str, float]]]) -> str:
    """A row per measurement, in Markdown."""
    rows = []
    for field, points in found.items():
        for p in points:
            numbers = (
                f"{p['ms']:.1f}",
                f"{p['steps_per_second']:,.0f}",
                f"{p['memory_mb']:,.0f}",
                f"{p['compile']:.1f}",
            )
            rows.append([AXES[field][0], str(p["value"]), *numbers])
    return markdown.table(["axis", "value", "ms/update", "steps/s", "peak memory (MB)", "compile (s)"], rows)


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One panel per axis: time of an update and peak memory, both from 0."""
    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained")
    for panel, (field, points) in zip(panels, found.items(), strict=True):
        values = [p["value"] for p in points]
        panel.plot(values, [p["ms"] for p in points], "o-", color="tab:blue")
        panel.set(xlabel=AXES[field][0], ylabel="ms per update", xlim=(0, None), ylim=(0, None))
        memory = panel.twinx()
        memory.plot(values, [p["memory_mb"] for p in points], "s--", color="tab:orange")
        memory.set(ylabel="peak memory (MB)", ylim=(0, None))
        panel.yaxis.label.set_color("tab:blue")
        memory.yaxis.label.set_color("tab:orange")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    found = measure(command_line.required_config(), FLAGS.seconds)
    Path(f"{FLAGS.out}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, Path(f"{FLAGS.out}.png"))
    print(machine())
    print(as_table(found), end="")
    return 0


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_string("out", "growth", "Where the results go, without ending.")
    flags.DEFINE_float("seconds", 5.0, "Each measurement takes at least this long, after warm-up.")
    command_line.run(main)
