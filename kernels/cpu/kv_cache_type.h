#pragma once

#include <cstdint>

namespace nestor {

// How the CPU keeps keys and values. Plain data: files compiled for other instruction sets include
// it.
enum class KvCacheType : uint8_t {
  kBfloat16,  // rounded to nearest even
  kFloat32,
};

}  // namespace nestor
