"""Plays whole games with a trained agent: dvrl-evaluate --workdir=saved_runs/3 [--video=out.mp4]"""

import statistics
from pathlib import Path

from absl import flags

from dvrl_jax.runs import command_line, config, process
from dvrl_jax.runs.waiting import waiting

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
EPISODES = flags.DEFINE_integer("episodes", 20, "How many games to play.", lower_bound=1, upper_bound=config.LARGEST)
GREEDY = flags.DEFINE_boolean("greedy", False, "Take the most probable action instead of sampling.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "'best' (by result.true), 'latest', or an update number.")
SEED = flags.DEFINE_integer(
    "seed", 1_000_000, "Fixes games and draws; other than in training by default.", lower_bound=0, upper_bound=2**31 - 1
)
VIDEO = flags.DEFINE_string("video", None, "Also draws one game's belief: name of an .mp4, .gif or .png (a still).")
VIDEO_STEPS = flags.DEFINE_integer("video_steps", 1000, "Most steps that the video shows.", lower_bound=1)


def main() -> int:
    process.share_gpu()

    with waiting("loading Flax, Orbax and EnvPool"):
        from dvrl_jax.runs import compilation
        from dvrl_jax.viewing import evaluation

    compilation.check_device()
    path = Path(WORKDIR.value)
    if VIDEO.value:
        evaluation.check_video(path, Path(VIDEO.value))
    results = [_evaluate(one) for one in config.seed_directories(path)]
    if len(results) > 1:
        error = statistics.stdev(results) / len(results) ** 0.5
        print(f"\nreturn {statistics.fmean(results):.2f} +- {error:.2f} (mean and standard error of the seeds)")
    return 0


def _evaluate(path: Path) -> float:
    """Plays with one seed's run, prints and stores what came out, and returns the mean return."""
    from dvrl_jax.viewing import evaluation

    result = evaluation.evaluate(path, EPISODES.value, GREEDY.value, CHECKPOINT.value, SEED.value)
    error = "" if result["standard_error"] is None else f" +- {result['standard_error']:.2f}"
    newest = evaluation.newest_checkpoint(path)
    is_older = CHECKPOINT.value == "best" and result["update"] < newest
    why = f" (highest result.true; --checkpoint=latest is of update {newest:,})" if is_older else ""
    print(f"{path}: checkpoint of update {result['update']:,}{why}, {result['episodes']} games")
    print(f"return {result['mean']:.2f}{error} (mean and standard error)")
    print(f"median {result['median']:.2f}, from {result['min']:.2f} to {result['max']:.2f}")
    print(f"{result['mean_length']:.0f} steps per game")
    try:
        evaluation.store(path, result)
    finally:  # The video need not be stored where the result is.
        if VIDEO.value:
            shown = (GREEDY.value, str(result["update"]), SEED.value)
            evaluation.write_video(path, Path(VIDEO.value), VIDEO_STEPS.value, *shown)
            print(VIDEO.value)
    return result["mean"]


def run() -> None:
    """Runs `main` with this process's arguments, and ends the process."""
    command_line.run(main)


if __name__ == "__main__":
    run()
