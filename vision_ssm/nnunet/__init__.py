"""Trainers for nnU-Net v2, which finds them where ``nnUNet_extTrainer`` points: at this folder.

nnU-Net imports every module of that folder by its bare name, hence the long name of the only one. Nothing else in the
package imports it, so nnU-Net is only needed to use it.
"""
