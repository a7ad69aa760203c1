"""Datasets and MONAI transforms: checked NIfTI volumes, 2.5-D slices, random draws, and small embedded sets."""
