"""Operators of vision_ssm. The folder is /kernels in the repository and vision_ssm.kernels when imported."""

if __name__ == "vision_ssm.kernels":
    from .backends import backend_report
    from .cross_scan.op import cross_merge, cross_scan
    from .routed_scan.op import routed_scan
    from .routes import (
        ATROUS,
        AXIAL_3D,
        BIDIRECTIONAL,
        COLUMN,
        COLUMN_BACK,
        CROSS,
        HILBERT,
        HILBERT_3D,
        RASTER_3D,
        ROUTES,
        ROW,
        ROW_BACK,
        TRI_3D,
        Route,
        Routes,
        atrous,
        axial,
        find_routes,
        hilbert,
        raster,
        tri,
    )
    from .selective_scan.op import selective_scan
    from .ssd_scan.op import ssd_scan

    from . import flops  # isort: skip  # formulas of the operators above

    __all__ = [
        "ATROUS",
        "AXIAL_3D",
        "BIDIRECTIONAL",
        "COLUMN",
        "COLUMN_BACK",
        "CROSS",
        "HILBERT",
        "HILBERT_3D",
        "RASTER_3D",
        "ROUTES",
        "ROW",
        "ROW_BACK",
        "TRI_3D",
        "Route",
        "Routes",
        "atrous",
        "axial",
        "backend_report",
        "cross_merge",
        "cross_scan",
        "find_routes",
        "flops",
        "hilbert",
        "raster",
        "routed_scan",
        "selective_scan",
        "ssd_scan",
        "tri",
    ]
else:  # a checkout on sys.path, where libraries look for the package of the bare name and must not stumble
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path
    from types import ModuleType

    class _Nothing(ModuleType):
        __version__ = "0"  # older than any that a library would take for the package

        def __getattr__(self, name: str) -> object:
            error = AttributeError if name.startswith("__") else ImportError
            raise error(f"kernels has no {name}: import vision_ssm.kernels; the bare name belongs to another project")

    _others = [entry for entry in sys.path if not Path(entry, "kernels", "routed_scan").exists()]  # no checkouts
    _spec = PathFinder.find_spec(__name__, _others)
    if _spec is None or _spec.loader is None:
        sys.modules[__name__].__class__ = _Nothing
        del __path__  # no modules either
    else:  # installed: it takes this module's place
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
