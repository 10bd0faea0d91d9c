"""What pretraining takes for millions of images on many GPUs: a model of its costs, printed as the table of docs/scale.md.

    python benchmarks/scale.py

Constants are measured here (recipes/LOG.md, RESULTS.md) or published; each says which. Nothing of it has been run on more than one GPU.
"""

from dataclasses import dataclass

VIEWS = 2
EPOCHS = 100
SIZE = 224
SIDE = 280  # cached squares, 1.25 times the view
PARAMETERS = 23.5e6 + 4.5e6  # ResNet-50 and its projection head
PROJECTION = 128
BATCH_NORMS = 55
NETWORK_IMAGES = 3079  # per second, ResNet-50 at 224 px forward and backward, one H200: lambdal/deeplearning-benchmark, published
DECODED = 621  # per second and core, ImageNet-sized JPEGs by torchvision, Zen 4: ternaus/imread_benchmark, published
CORES = 16  # beside each GPU
WITHIN, BETWEEN = (
    300e9,
    50e9,
)  # bytes per second of a GPU's links in a machine, and to others (400 Gb/s): assumed
MULTIPLIED = 50e12  # float32 operations per second of the loss: assumed
LATENCY_WITHIN, LATENCY_BETWEEN = 20e-6, 60e-6  # of one collective, seconds: assumed
GPUS_A_MACHINE = 8
PAIRS_SECONDS = 8.0 / 60_000**2  # all pairs of 60,000 CIFAR-10 images in 8 s on two cores: measured here
NAME_BYTES = 100  # of a file in the listing, names of 14 letters: measured here, 1,000,000 files
CHECKPOINT = 3 * 4 * PARAMETERS


@dataclass(frozen=True)
class Cost:
    """Of one step, seconds, and of the whole, hours and bytes."""

    network: float
    gradients: float
    batch_norm: float
    loss: float
    hours: float
    decoding: float
    pairs: float
    cache: float
    memory: float

    @property
    def step(self) -> float:
        """Seconds of one step, nothing overlapping."""
        return self.network + self.gradients + self.batch_norm + self.loss


def cost(images: float, gpus: int, images_a_gpu: int = 256) -> Cost:
    """Costs of `EPOCHS` epochs at a global batch of so many images for each GPU."""
    batch = images_a_gpu * gpus
    one_machine = gpus <= GPUS_A_MACHINE
    bandwidth, latency = (WITHIN, LATENCY_WITHIN) if one_machine else (BETWEEN, LATENCY_BETWEEN)
    share = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus
    network = VIEWS * images_a_gpu / NETWORK_IMAGES
    gradients = share * 4 * PARAMETERS / bandwidth
    batch_norm = 0.0 if gpus == 1 else 2 * BATCH_NORMS * latency
    multiply = (
        3 * 2 * (VIEWS * batch) * (VIEWS * images_a_gpu) * PROJECTION
    )  # similarities, once more, and their product
    loss = (share / 2) * 4 * VIEWS * batch * PROJECTION / bandwidth + multiply / MULTIPLIED
    steps = EPOCHS * images / batch
    step = network + gradients + batch_norm + loss
    return Cost(
        network,
        gradients,
        batch_norm,
        loss,
        steps * step / 3600,
        images / (DECODED * CORES * gpus) / 3600,
        PAIRS_SECONDS * images**2 / 3600,
        images * 3 * (SIDE**2 + SIZE**2),
        images * NAME_BYTES,
    )


def main() -> None:
    print(
        "| images | GPUs | ms a step: network, gradients, batch norm, loss | training, hours | decoding once, hours | cache, TB |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for images in (1e6, 1e7, 1e8, 1e9):
        for gpus in (1, 8, 64, 512):
            found = cost(images, gpus)
            parts = ", ".join(
                f"{1e3 * each:.1f}" for each in (found.network, found.gradients, found.batch_norm, found.loss)
            )
            print(
                f"| {images:,.0f} | {gpus} | {parts} | {found.hours:,.1f} | {found.decoding:,.1f} | {found.cache / 1e12:,.1f} |"
            )
    print()
    print("| images | all pairs compared on two cores, hours | listing in memory, GB | checkpoint, GB |")
    print("| --- | --- | --- | --- |")
    for images in (1e6, 1e7, 1e8, 1e9):
        found = cost(images, 1)
        print(f"| {images:,.0f} | {found.pairs:,.1f} | {found.memory / 1e9:,.1f} | {CHECKPOINT / 1e9:.2f} |")


if __name__ == "__main__":
    main()
