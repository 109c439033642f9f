import runpy  # scripts that are started in this folder find the package `common` through this file

runpy.run_path(f"{__file__.removesuffix('common.py')}../common/clone.py")
