"""A cleaned copy of an image folder: the kept files, copied or linked to; the originals are only read.

    python -m analysis.kept_copy kept.txt --source photos --copy-to photos-clean

`kept.txt` is what an audit writes, and may be edited: one name a line, relative to the source.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from stages.lib import stage
from stages.lib.errors import UserError


def make(names: list[str], source: Path, target: Path, *, link: bool) -> None:
    """Put the files `names` of `source` under `target` with the same folders, as copies or as symbolic links.

    All or nothing: the tree is made under a temporary name beside `target`. Raises UserError if the target is there and
    is no empty folder, lies within the source or around it, or a name is missing, stands twice or leads out of the source.
    """
    source, target = source.resolve(), Path(os.path.abspath(target))
    check_target(source, target)
    if source.is_file():
        raise UserError(f"{source} is a file, and kept.txt names rows of its arrays: pick them in Python (README.md)")
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{name!r} stands {times} times among the kept; expected each name once")
        path = source / name
        if "\0" in name:  # no path holds one
            raise UserError(f"{name!r} is no name of a file")
        inside = Path(os.path.realpath(path)).is_relative_to(source)  # Path.resolve fails for a link to itself
        if Path(name).is_absolute() or ".." in Path(name).parts or not inside:
            raise UserError(f"{name!r} leads out of {source}; expected names relative to it")
        if not path.is_file():
            raise UserError(f"{path} is not there; is {source} the folder that was audited?")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name in names:
            to = temporary / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if link:
                to.symlink_to((source / name).resolve())
            else:
                shutil.copy2(source / name, to)
        temporary.chmod(0o755)
        if target.exists():
            target.rmdir()  # it is empty, and rmdir takes no other
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(source: Path, target: Path) -> None:
    """Refuse a target that could touch the originals or that holds something."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is no folder; expected a new or an empty one")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is there and not empty; expected a new or an empty folder")
    real = target.resolve()
    if real.is_relative_to(source.resolve()) or source.resolve().is_relative_to(real):
        raise UserError(f"{target} lies within {source} or around it; choose a folder beside it")


def read_names(path: Path) -> list[str]:
    try:
        names = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: expected the kept.txt of an audit") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: expected the kept.txt of an audit") from error
    if not names:
        raise UserError(f"{path} names no file")
    return names


def main(args) -> None:
    names = read_names(args.kept)
    make(names, args.source, args.copy_to or args.link_to, link=args.link_to is not None)
    print(f"{len(names)} files {'linked' if args.link_to else 'copied'} to {args.copy_to or args.link_to}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m analysis.kept_copy", description=__doc__.partition("\n")[0])
    options.add_argument("kept", type=Path, help="kept.txt of an audit")
    options.add_argument("--source", type=Path, required=True, help="the folder that was audited")
    target = options.add_mutually_exclusive_group(required=True)
    target.add_argument("--copy-to", type=Path, help="new or empty folder for copies")
    target.add_argument("--link-to", type=Path, help="new or empty folder for symbolic links")
    return options


if __name__ == "__main__":
    sys.exit(stage.run(main, parser()))
