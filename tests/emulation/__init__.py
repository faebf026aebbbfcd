"""Runs the CUDA kernels of csrc/cuda on a CPU, every access checked: see cuda_emu.h and memory.cpp."""
