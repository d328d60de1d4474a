#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace nestor {

// GPT-2's printable alphabet for bytes (bytes_to_unicode): printable Latin-1 stands for itself, the
// rest are U+0100 and up.

// Every byte of `text` as its character of the alphabet.
std::string ByteLevelText(std::string_view text);
// The bytes that `text` stands for; nullopt where a character is not of the alphabet.
// REQUIRES: `text` is valid UTF-8.
std::optional<std::string> BytesOfByteLevelText(std::string_view text);

}  // namespace nestor
