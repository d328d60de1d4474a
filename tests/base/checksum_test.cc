#include "base/checksum.h"

#include "base/file.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

// FIPS 180-2, appendix B.1.
constexpr const char* kShaOfAbc =
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST(Sha256Test, EqualsTheStandardsExample) {
  const std::string abc = "abc";
  EXPECT_EQ(Sha256(std::as_bytes(std::span(abc))), kShaOfAbc);
}

TEST(Sha256Test, FilesCountAsTheirConcatenation) {
  const TemporaryDirectory directory;
  const std::vector<std::string> paths = {directory.path() + "/1", directory.path() + "/2"};
  ASSERT_TRUE(WriteFileAtomically(paths[0], "a").ok());
  ASSERT_TRUE(WriteFileAtomically(paths[1], "bc").ok());
  EXPECT_EQ(*Sha256OfFiles(paths), kShaOfAbc);
  EXPECT_TRUE(
      absl::IsNotFound(Sha256OfFiles(std::vector<std::string>{directory.path() + "/3"}).status()));
}

}  // namespace
}  // namespace nestor
