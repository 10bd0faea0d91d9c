"""The augmentations of SimCLR: batched, on the training device, one random draw per image and view.

`draws` decides, on the CPU and by counter; `geometry`, `color` and `blur` carry out; `pipeline` puts
them in the paper's order. Nothing here knows settings, files or models.
"""
