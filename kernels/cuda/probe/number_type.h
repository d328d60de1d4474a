#pragma once

#include <cstdint>

namespace nestor::probe {

// The types that products read and write. kFp8 is e4m3.
enum class NumberType { kBf16, kFp8, kFloat, kDouble };

constexpr int64_t BytesOf(NumberType type) {
  return type == NumberType::kFp8     ? 1
         : type == NumberType::kBf16  ? 2
         : type == NumberType::kFloat ? 4
                                      : 8;
}

constexpr const char* NameOf(NumberType type) {
  return type == NumberType::kFp8     ? "fp8"
         : type == NumberType::kBf16  ? "bf16"
         : type == NumberType::kFloat ? "float"
                                      : "double";
}

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace nestor::probe
