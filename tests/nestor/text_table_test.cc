#include "nestor/text_table.h"

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(TextTableTest, AlignsEveryColumnToTheRight) {
  TextTable table({"level", "form"});
  table.AddRow({"0", "residual"});
  table.AddRow({"12", "full"});
  EXPECT_EQ(table.Render(),
            "level      form\n"
            "    0  residual\n"
            "   12      full\n");
}

}  // namespace
}  // namespace nestor
