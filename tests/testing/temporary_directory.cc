#include "tests/testing/temporary_directory.h"

#include <cstdlib>
#include <filesystem>

#include "base/check.h"

namespace nestor {

TemporaryDirectory::TemporaryDirectory()
    : path_((std::filesystem::temp_directory_path() / "nestor-test-XXXXXX").string()) {
  NESTOR_CHECK(::mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace nestor
