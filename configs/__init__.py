"""Pure-Python mmengine configs; read as files by name, such as ``medical/deep_grey_vmamba_unet``."""

if __name__ != "vision_ssm.configs":  # a checkout on sys.path
    raise ImportError("import vision_ssm.configs; the bare name 'configs' belongs to another project")
