#pragma once

#include "kernels.h"

namespace luke_kernels {

// The kernels that run: the best of this machine, up to the cap.
const Kernels& kernels();

}  // namespace luke_kernels
