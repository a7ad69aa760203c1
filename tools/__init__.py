"""Command line of vision_ssm: argument parsing only; what a command does is in ``vision_ssm.engine``."""

if __name__ != "vision_ssm.tools":  # a checkout on sys.path
    raise ImportError("import vision_ssm.tools; the bare name 'tools' belongs to another project")
