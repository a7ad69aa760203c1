"""Operators of vision_ssm. The folder is /kernels in the repository and vision_ssm.kernels when imported."""

if __name__ == "vision_ssm.kernels":
    from .backends import backend_report
    from .cross_scan.op import cross_merge, cross_scan
    from .linear_scan.op import linear_scan, linear_step
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
        "linear_scan",
        "linear_step",
        "raster",
        "routed_scan",
        "selective_scan",
        "ssd_scan",
        "tri",
    ]
else:  # a checkout on sys.path
    import sys

    from .bare_name import step_aside

    step_aside(sys.modules[__name__])
