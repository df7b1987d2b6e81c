"""The code of the CUDA kernels. Only the compiling process and the tests import these files: they load triton."""
