"""`labelwise predict` against the forward pass of its own network alone, in one process.

    python benchmarks/predict.py RUN IMAGES      # a run with a classifier; a folder of JPEG files, 10,000 or more of CIFAR-10

Two figures, 1.00 where nothing but the forward pass takes time. `decoded`: pixels are in memory; what is left is calibration, sets,
distances, parts and the table. `from files`: the whole command, which reads and decodes beside the forward pass. The rival is the
network on the same pixels, normalised, 256 at once, with torch's own threads, and nothing else. `streams` is the same network in
the streams that `predict` runs it in, beside that rival: how much of the two figures they give. Cost: seconds per image.
"""

import tempfile
from pathlib import Path

import numpy as np
from paired import compare, parser, seconds, show
from pipeline import link_some

from labelwise.images.cache import held_at_once, read_evaluations
from labelwise.images.source import open_images
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.precision import choose_device
from labelwise.models.features import extract_features, map_in_streams
from labelwise.rundir import open_run, read_json
from labelwise.stages.classifier import read_calibration
from labelwise.stages.oracle import load_oracle, make_promise
from labelwise.stages.predicting import predict
from labelwise.tables import open_parts, open_table


def main() -> None:
    options = parser(__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("images", type=Path)
    options.add_argument("--count", type=int, default=10_000, help="images")
    options.add_argument("--device", default="auto")
    given = options.parse_args()
    keep_freed_memory()
    run = open_run(given.run)
    place = choose_device(given.device)
    oracle = load_oracle(run, make_promise(run, read_calibration(run), None), place)
    with tempfile.TemporaryDirectory() as folder:
        images = open_images(link_some(given.images, Path(folder) / "images", given.count))
        rows = np.arange(len(images.names))
        deep = read_json(run.data)["intensity_range"]
        pixels = np.concatenate(
            [each for _, each in read_evaluations(images, rows, oracle.spec.image_size, deep, [])]
        )
        out = Path(folder) / "out.csv"

        def forward() -> float:
            network, normalization = oracle.speaker.classifier, oracle.spec.normalization
            return seconds(lambda: extract_features(network, pixels, rows, normalization, place)) / len(rows)

        def decoded() -> float:
            return seconds(lambda: fill_from_memory(oracle, pixels, images.names, out)) / len(rows)

        def whole() -> float:
            cost = seconds(lambda: predict(run, [images.root], out, device=given.device)) / len(rows)
            out.unlink()
            return cost

        def streams() -> float:
            network, normalization = oracle.speaker.classifier, oracle.spec.normalization
            chunks = (pixels[start : start + 256] for start in range(0, len(pixels), 256))

            def work(some: np.ndarray) -> object:
                return extract_features(network, some, np.arange(len(some)), normalization, place)

            return seconds(lambda: list(map_in_streams([work], chunks, place))) / len(rows)

        figures = [
            compare("streams", streams, forward, 1.0),
            compare("decoded", decoded, forward, 0.9),
            compare("from files", whole, forward, 0.7),
        ]
    show(figures, given.json)


def fill_from_memory(oracle, pixels: np.ndarray, names: list[str], out: Path) -> None:
    """What `predict` does once files are decoded."""
    columns = oracle.columns(probabilities=False)
    with open_parts(out, columns, "") as parts:
        together = held_at_once(oracle.spec.image_size)
        chunks = [slice(start, start + together) for start in range(0, len(pixels), together)]
        answers = map_in_streams(
            [lambda some: oracle.tell(names[some], pixels[some])], (some for some in chunks), oracle.place
        )
        for some, told in zip(chunks, answers, strict=True):
            parts.add(min(some.stop, len(pixels)), {name: told[name] for name in columns}, [])
        with open_table(out, out.suffix, columns) as table:
            for part, _ in parts.read():
                table.write(part)
    out.unlink()


if __name__ == "__main__":
    main()
