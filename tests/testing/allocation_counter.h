#pragma once

#include <cstdint>

namespace nestor {

// Allocations by `operator new` in all its forms, on all threads, since the program started. A
// program that links this has its global operators new and delete replaced by counting ones.
int64_t NumAllocations();

}  // namespace nestor
