#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace nestor {

// GPT-2's printable alphabet for bytes (bytes_to_unicode): printable Latin-1 stands for itself, the
// rest are U+0100 and up.

// Every byte of `text` as its character of the alphabet.
std::string ByteLevelText(std::string_view text);
// Appends the bytes that `text` stands for; false, and nothing, where a character is not of the
// alphabet. REQUIRES: `text` is valid UTF-8.
bool AppendBytesOfByteLevelText(std::string_view text, std::string* bytes);

}  // namespace nestor
