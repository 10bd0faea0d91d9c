"""Write a public image set as `train/CLASS/*.png` and `test/CLASS/*.png`.

    python data/public.py cifar10 /tmp/cifar10

The sets are read from the Hugging Face Hub by the `datasets` library and need the network.
"""

import argparse
from pathlib import Path

import datasets

# name: dataset on the Hub, image column, label column, {split there: split here}
SETS = {
    "cifar10": ("uoft-cs/cifar10", "img", "label", {"train": "train", "test": "test"}),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", {"train": "train", "test": "test"}),
    "eurosat": ("blanchon/EuroSAT_RGB", "image", "label", {"train": "train", "test": "test"}),
    "pets": ("timm/oxford-iiit-pet", "image", "label", {"train": "train", "test": "test"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    hub, image_column, label_column, splits = SETS[given.name]
    for theirs, ours in splits.items():
        table = datasets.load_dataset(hub, split=theirs)
        names = table.features[label_column].names
        for number, row in enumerate(table):
            target = given.out / ours / names[row[label_column]].replace("/", "_") / f"{number:06d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            row[image_column].convert("RGB").save(target)
        print(f"{given.out / ours}: {len(table):,} images, {len(names)} classes")


if __name__ == "__main__":
    main()
