#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace nestor {

// SHA-256 of `bytes`, as 64 lower-case hexadecimal digits.
std::string Sha256(std::span<const std::byte> bytes);

// SHA-256 of the concatenation of several files' contents, in the order given. The error of a
// file that cannot be read names it.
absl::StatusOr<std::string> Sha256OfFiles(std::span<const std::string> paths);

}  // namespace nestor
