"""Take a part of an image set with the same number of images of each class.

    python data/subset.py cifar10.zip /tmp/cifar --train 10000 --test 2000
    python data/subset.py cifar10.zip /tmp/cifar-other --train 10000 --test 2000 --part 1

SOURCE is a zip file or a folder that holds `train/CLASS/*` and `test/CLASS/*`. Different parts share no
image. The files are copied as they are.
"""

import argparse
import random
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, required=True, help="training images in all")
    parser.add_argument("--test", type=int, required=True, help="test images in all")
    parser.add_argument("--part", type=int, default=0, help="which part of the shuffled images, from 0")
    given = parser.parse_args()

    with zipfile.ZipFile(given.source) if given.source.is_file() else FolderArchive(given.source) as archive:
        groups = group_by_class(archive.namelist())
        for split, count in (("train", given.train), ("test", given.test)):
            classes = [key for key in sorted(groups) if key[0] == split]
            if not classes:
                raise SystemExit(f"{given.source}: holds no {split}/CLASS folders")
            for key in classes:
                for name in pick(groups[key], count // len(classes), given.part, "/".join(key)):
                    target = given.out / split / key[1] / PurePosixPath(name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    print(
        f"{given.out}: {given.train} training and {given.test} test images, part {given.part} of {given.source.name}"
    )


class FolderArchive:
    """The three methods of a zip file, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "FolderArchive":
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def namelist(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def group_by_class(names: list[str]) -> dict[tuple[str, str], list[str]]:
    """Sort file names by (split, class): the last two folders above the file."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        parts = PurePosixPath(name).parts
        if len(parts) >= 3:
            groups[(parts[-3], parts[-2])].append(name)
    return groups


def pick(names: list[str], count: int, part: int, key: str) -> list[str]:
    """Take one part of the names, always in the same shuffled order."""
    order = sorted(names)
    random.Random(key).shuffle(order)  # noqa: S311
    chosen = order[part * count : (part + 1) * count]
    if len(chosen) < count:
        raise SystemExit(f"{key}: {len(names)} images are too few for part {part} of {count} each")
    return chosen


if __name__ == "__main__":
    main()
