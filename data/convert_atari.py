"""Converts Atari datasets, without TensorFlow; downloads RL Unplugged's.

    python -m data.convert_atari --env-id Breakout --run 1 --shards 0 10-19 --percentage 10    # downloads and converts
    python -m data.convert_atari --env-id Breakout --source DIR_OR_FILES

Formats, known by the names of their files:

    rl_unplugged   run_1-00000-of-00050: RL Unplugged's own shards (Gulcehre et al. 2020, arXiv 2006.13888)
    tfds           *.tfrecord-00000-of-00001 and features.json: the same as TensorFlow Datasets leaves it on disk
    dqn_replay     $store$_observation_ckpt.0.gz and its siblings: DQN Replay (Agarwal et al. 2020, arXiv 1907.04543)
    minari         main_data.hdf5 or data/metadata.json: discrete actions and images; also by its name
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from data.dataset import FRAME, InputError, Source, convert_source, run_program
from data.dqn_replay import OBSERVATIONS, open_checkpoints
from data.minari_datasets import DATA, find_source, open_minari
from data.record_atari import OTHER_ROMS, TALL_SCREENS, default_folder, games, num_actions, reference_returns
from data.rl_unplugged import PREPARED, SHARDS, download, open_prepared, open_shards
from data.tfrecords import dataset_info

FILES = {"rl_unplugged": SHARDS, "tfds": PREPARED, "dqn_replay": OBSERVATIONS, "minari": DATA}
OPEN = {"rl_unplugged": open_shards, "tfds": open_prepared, "dqn_replay": open_checkpoints}
NO_NUMBER = -1  # of a file that is not one of several shards


@dataclass(frozen=True)
class Args:
    env_id: str  # the game that the data are of, such as Breakout
    source: tuple[Path, ...] = ()  # folder or files to convert, or a Minari dataset's name; without it --run is downloaded
    run: int | None = None  # run of RL Unplugged, 1 to 5
    shards: tuple[str, ...] = ()  # numbers and ranges of shards or checkpoints, such as 0 10-19; by default all
    percentage: float = 100.0  # part of the episodes to take, evenly spaced
    observation_key: str | None = None  # which of a Minari dataset's Dict observations to take
    out: Path | None = None  # folder to make; by default the place where the training scripts look for it
    download_dir: Path = Path("datasets/downloads/rl_unplugged")  # where downloaded shards stay


def parse_shards(texts: tuple[str, ...]) -> list[int]:
    """0 10-12 -> [0, 10, 11, 12]. Raises InputError for anything else."""
    numbers: set[int] = set()
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise InputError(f"--shards takes numbers and ranges such as 0 10-19, not {text!r}")
        numbers.update(span)
    return sorted(numbers)


def find_files(args: Args, shards: list[int]) -> tuple[str, list[Path]]:
    """The format and, in order, its files (of DQN Replay those of the observations) that --shards names, or all.

    Raises InputError if there is no dataset, several, or if a shard of it is missing.
    """
    paths = [find_source(path) for path in args.source]
    source = ", ".join(map(str, args.source))
    found: dict[tuple[str, Path, str | None, str | None], dict[int, list[Path]]] = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            for name, pattern in FILES.items():
                match = pattern.fullmatch(file.name) or pattern.fullmatch("/".join(file.absolute().parts[-2:]))
                group = match.groupdict() if match else {}
                run, count, shard = group.get("run"), group.get("count"), int(group.get("shard") or NO_NUMBER)
                if match and (run is None or args.run in (None, int(run))):
                    found.setdefault((name, file.parent, run, count), {}).setdefault(shard, []).append(file)
    if not found:
        raise InputError(f"{source} holds no files of a known format")
    if len(found) > 1:
        kinds = ", ".join(f"{name} in {folder}" + (f" run {run}" if run else "") for name, folder, run, _ in found)
        raise InputError(f"{source} holds several datasets ({kinds}): choose one by --source or --run")
    (name, folder, _, count), parts = found.popitem()
    last = int(count or len(dataset_info(folder).get("splits", ())) or max(parts) + 1)
    numbered = NO_NUMBER not in parts and all(path.is_dir() for path in paths)
    whole = range(last) if numbered else sorted(parts)
    for number in shards or whole:
        if number not in parts:
            raise InputError(f"{folder} lacks shard {number}" + ("" if shards else "; --shards converts a part"))
    return name, [file for number in shards or whole for file in parts[number]]


def check_name(path: Path, env_id: str) -> None:
    """Raises InputError if the folders around `path`, or TensorFlow Datasets' description, name another game."""
    names = [*path.absolute().parent.parts, str(dataset_info(path.parent).get("configName"))]
    named = [game for name in names if (game := re.sub(r"_run_\d+$", "", name)) in games()]
    if named and named[-1] != env_id:
        raise InputError(f"{path} is of {named[-1]}, not of {env_id}")


def open_source(args: Args, out: Path) -> Source:
    """What to convert, downloaded if need be, with all of meta.json. Raises InputError for data of another game."""
    shards = parse_shards(args.shards)
    if args.source:
        name, files = find_files(args, shards)
    elif args.run is not None:
        num_actions(args.env_id)
        name = "rl_unplugged"
        files = download(args.env_id, args.run, shards, args.download_dir, out, args.percentage / 100)
    else:
        raise InputError("name what to convert by --source, or a run of RL Unplugged to download by --run 1 (to 5)")
    source = open_minari(files[0].parent, args.observation_key) if name == "minari" else OPEN[name](files)
    if source.shape != FRAME:
        raise InputError(f"{files[0].parent} has no images: python -m data.convert_bsuite converts it")
    check_name(files[0], args.env_id)
    actions = num_actions(args.env_id)
    if source.meta.get("num_actions", actions) != actions:
        raise InputError(f"{files[0]} has {source.meta['num_actions']} actions, but {args.env_id} has {actions}")
    meta = {"benchmark": "atari", "num_actions": actions, "reference_returns": reference_returns(args.env_id)}
    if name != "minari" and args.env_id in OTHER_ROMS:
        old = "of the data's it shows 210 of 250 lines" if args.env_id in TALL_SCREENS else "--rom-dir mends it"
        meta["notice"] = f"EnvPool shows other pictures of {args.env_id} than the data: its ROM is another one; {old}"
    taken = {"files": [file.name for file in files], "percentage": args.percentage}
    return source._replace(meta=meta | source.meta | taken | {"env_id": args.env_id})


def convert(args: Args) -> Path:
    """Downloads if need be, converts, and returns the new folder.

    Raises InputError for damaged or missing files, data of another game, and a full disk; then nothing is left behind
    but what was downloaded.
    """
    if not 0 < args.percentage <= 100:
        raise InputError("--percentage is above 0 and at most 100")
    out = args.out or default_folder(args.env_id)
    if out.exists():
        raise InputError(f"{out} exists already; remove it or name another folder")
    return convert_source(open_source(args, out), out, args.percentage)


if __name__ == "__main__":
    run_program(lambda: convert(tyro.cli(Args, description=__doc__)))
