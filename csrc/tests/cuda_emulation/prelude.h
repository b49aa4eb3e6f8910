// Read before each file of csrc/cuda: its operations become rds_fast_emulated::*, for CPU tensors.
#pragma once

#define USE_CUDA  // PyTorch's C shim declares its CUDA functions only then
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>

#include "emulator.h"

// The names that STABLE_TORCH_LIBRARY_IMPL registers under.
#define rds_fast_native rds_fast_emulated
#define CUDA CPU

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) cuda_emulation::fault("fails the assertion " #condition)
