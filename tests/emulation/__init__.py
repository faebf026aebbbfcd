"""Runs the CUDA kernels of csrc/cuda on a CPU and checks every access: see cuda_emu.h and memory.cpp."""
