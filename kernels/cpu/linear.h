#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/packed_linear.h"
#include "kernels/cpu/thread_pool.h"

namespace nestor {

// Rows [begin, end) of a call.
struct RowBlock {
  int64_t begin = 0;
  int64_t end = 0;
};

// Rows of int8 codes and, for every 32 of them, a scale and an offset (QuantisedRow). Code `at` has
// those at `at` / 32, so strides are multiples of 32.
struct CodedRows {
  AlignedBuffer<int8_t> codes;
  AlignedBuffer<float> scales;
  AlignedBuffer<int32_t> offsets;

  void GrowTo(int64_t size);
  // REQUIRES: `at` and `stride` are multiples of 32.
  QuantisedRows From(int64_t at, int64_t stride) const;
};

// Runs LinearCalls: several layers over one input, rows in groups of mixed forms and ranks.
//
// A gar pair's outputs lie in an order of their own, so they are made in scratch, 16 or 32 at a
// time, and scattered; its z = A x are its first outputs as they are.
//
// Up to kMaxFewRows rows: activations are rounded to int8 once, then one phase on the pool
// computes z = A x of every factor and, for every 32 outputs, all that they need: planes, then
// B z, bias. The coarse plane is read once for residual, middle and dense rows together. More rows:
// panels are unpacked one by one, for all groups at once, and multiplied in what the machine is
// fastest at: planes and factors in int8, bf16 weights in bf16, or all in fp32. Layers with
// float_activations go that second way with any number of rows, in fp32.
//
// Not thread-safe. Scratch has room for few rows once layers are
// prepared for, grows to the largest call seen, and stays.
class LinearRunner {
 public:
  // Both must outlive the runner.
  LinearRunner(const CpuKernels* kernels, ThreadPool* pool);

  // Makes room for what up to kMaxFewRows rows of `layer` may need, at any level: the first step at
  // a level that no step ran before allocates nothing, but for layers with float_activations.
  // Before it is run.
  void PrepareFor(const PackedLinear& layer);
  void Run(const LinearCall& call, std::span<const PackedLinear> layers);
  // An MLP of many rows whose parts all run in int8: every 32 outputs of its first half become
  // codes while they are in the cache, and are never written as floats. False, and nothing done,
  // where that is not so.
  bool RunMlp(const MlpCall& call, std::span<const PackedLinear> layers);

  // Counted where the kernels are called: bytes once for a pass over a part, FLOPs for each row.
  LinearCost executed() const;

 private:
  // What a panel of many rows is multiplied in.
  enum class Arithmetic : uint8_t { kFp32, kInt8, kBf16 };
  // An unpacked panel: half a first-level cache.
  static constexpr int64_t kPanelBytes = 16384;
  // Units whose planes are read without a break; the sums of one row take 2 KB.
  static constexpr int64_t kUnitsPerRun = 16;

  // The rows of a part that run one kind of factors.
  struct FactorStage {
    Form form = Form::kResidual;
    const PackedFactors* factors = nullptr;
    const int32_t* row_order = nullptr;  // of a gar pair: [out], the pivots first
    int64_t outputs = 0;                 // of B
    int64_t max_rank = 0;                // of this call's groups, at least 1; all of a gar pair's
    int64_t z_offset = 0;                // into z_: [call rows][z_stride]
    int64_t z_stride = 0;
    // Few rows only, highest rank first.
    int num_rows = 0;
    QuantisedRow rows[kMaxFewRows];
    int64_t ranks[kMaxFewRows];

    bool IsGar() const { return row_order != nullptr; }
    bool Runs(const RowGroup& group) const {
      return group.form == form && (!IsGar() || group.rank == max_rank);
    }
  };
  struct PartPlan {
    const PackedLinear* layer = nullptr;
    const LinearPart* part = nullptr;
    // Kept from call to call; of this one the first `num_stages`: residual and prefix where there
    // are such rows, then a gar pair for each rank.
    std::vector<FactorStage> all_stages;
    size_t num_stages = 0;
    bool is_all_gar = false;  // no row of another form

    std::span<FactorStage> stages() { return std::span(all_stages).first(num_stages); }
    std::span<const FactorStage> stages() const { return std::span(all_stages).first(num_stages); }
    // Few rows only.
    int num_coarse = 0;
    QuantisedRow coarse[kMaxFewRows];
    int num_middle = 0;
    QuantisedRow middle[kMaxFewRows];
    int num_planes = 0;
    QuantisedRow planes[kMaxFewRows];
    int num_dense = 0;  // bf16 or fp32
    FloatRow dense[kMaxFewRows];
  };
  struct alignas(64) ThreadState {
    LinearCost executed;
    AlignedBuffer<float> scaled_z;
    AlignedBuffer<float> gate, up;   // of an MLP: [rows of a block][32]
    AlignedBuffer<float> unordered;  // of a gar pair: [rows of a block][16]
    AlignedBuffer<uint8_t> fine;     // of few rows: the panel that a middle one means
    alignas(64) uint8_t panel[kPanelBytes];
    alignas(64) float sums[kUnitsPerRun * kMaxFewRows * kUnitOutputs];
  };

  static const float* InputRow(const LinearCall& call, int64_t row);
  static float* OutputRow(const LinearPart& part, int64_t row);
  void RunParts(const LinearCall& call, std::span<const PackedLinear> layers);
  // Layers, stages and their place in z_.
  void PlanCall(const LinearCall& call, std::span<const PackedLinear> layers);
  // Adds the stage that runs `group`, where it runs factors and has none yet.
  static void PlanStage(const RowGroup& group, PartPlan* plan);
  // out[row_order[first + i]] (+)= values[i] + bias, for `count` outputs of a gar pair and one row.
  static void Scatter(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                      int64_t row, int64_t first, int64_t count, const float* values);

  // linear.cc: few rows.
  void RunFewRows(const LinearCall& call);
  bool NeedsCodes(const LinearCall& call) const;
  // Of rows of codes: scales may be read up to a multiple of 8.
  static int64_t CodeStride(int64_t cols);
  // Makes room for the codes of the call's input, then fills in one row.
  void PrepareCodes(const LinearCall& call);
  void QuantiseRow(const LinearCall& call, int64_t row);
  void PlanRows(const LinearCall& call, PartPlan* plan);
  void AddFactorRows(const RowGroup& group, FactorStage* stage);
  // z is computed in pieces, claimed by whoever comes first: RunZPieces returns when none is left
  // to claim, WaitForZ when all are finished.
  void RunZPieces(const LinearCall& call, int thread);
  void WaitForZ() const;
  void RunComponent(const PartPlan& plan, const FactorStage& stage, int64_t k, int thread);
  // Units [begin, end) of a part, 32 outputs each; at most kUnitsPerRun.
  void RunUnits(const LinearCall& call, const PartPlan& plan, int64_t begin, int64_t end,
                int thread);
  void RunPanels(const PartPlan& plan, int64_t unit, float* sums, ThreadState* state);
  // B z of units [begin_unit, end_unit), whose sums lie `unit_size` floats apart.
  void RunFactorB(const FactorStage& stage, int64_t begin_unit, int64_t end_unit, float* sums,
                  int64_t unit_size, int thread);
  // All that a gar pair contributes to a share of the part's units: as large a share of B z, and of
  // the pivots.
  void RunGarUnits(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                   int64_t begin, int64_t end, int thread);
  // Adds the bias and writes the outputs, but for gar rows.
  void FinishUnit(const LinearCall& call, const PartPlan& plan, int64_t unit, float* sums,
                  LinearCost* executed);

  // linear_many_rows.cc: more, or in fp32.
  void RunManyRows(const LinearCall& call);
  // Blocks of rows, so that every thread keeps to its own.
  int64_t NumBlocks(int64_t rows) const;
  // The largest block of this many rows or fewer: fewer blocks may have more rows each.
  int64_t LargestBlock(int64_t rows) const;
  RowBlock BlockAt(int64_t rows, int64_t index) const;
  // z of all parts, then all outputs, of an input that has been converted.
  void RunZ(const LinearCall& call);
  void RunAllPanels(const LinearCall& call);
  bool RunsInCodes(const LinearCall& call, std::span<const PackedLinear> layers) const;
  // 32 columns of an MLP's hidden rows, as codes.
  void ExpandUnit(const MlpCall& call, int64_t unit, RowBlock block, int thread);
  // The input in the types that the call's parts multiply it in.
  void ConvertInput(const LinearCall& call);
  // z of 32 components from `first` on, and their codes.
  void RunGroupOfZ(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                   int64_t first, RowBlock block, int thread);
  // z of 16.
  void MultiplyByA(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                   int64_t first, RowBlock block, int thread);
  // Where the outputs of a panel go: those of row t at `data` + (t - first_row) * stride.
  struct Outputs {
    float* data = nullptr;
    int64_t stride = 0;
    int64_t first_row = 0;

    float* Row(int64_t row) const { return data + (row - first_row) * stride; }
  };
  static Outputs PanelOf(const LinearPart& part, int64_t panel);
  // 16 outputs.
  void RunPanel(const LinearCall& call, const PartPlan& plan, int64_t panel, RowBlock block,
                const Outputs& to, int thread);
  void MultiplyByWeights(const LinearCall& call, const PartPlan& plan, Form form, int64_t panel,
                         RowBlock block, const Outputs& to, int thread);
  void MultiplyByB(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                   int64_t panel, RowBlock block, const Outputs& to, int thread);
  // As large a share of a gar pair's outputs behind its pivots as a panel is of the part's.
  void RunGarPanels(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                    int64_t panel, RowBlock block, int thread);
  // Rows of rank 0: the bias alone.
  void SetToBias(const LinearCall& call, const PartPlan& plan, int64_t panel, RowBlock block,
                 const Outputs& to, int thread);
  Arithmetic ArithmeticOfPlanes(const PackedLinear& layer) const;  // and of factors
  Arithmetic ArithmeticOf(const PackedLinear& layer, Form form) const;
  // Inputs that fit into a panel.
  int64_t DepthOfPanel(Arithmetic arithmetic) const;
  // Inputs [begin, end) of a panel of the form's weights.
  void UnpackWeights(const PackedLinear& layer, Form form, int64_t panel, int64_t begin,
                     int64_t end, uint8_t* out) const;
  // Components [begin, end) of 16 outputs of B, as floats or as an int8 panel.
  void UnpackB(const FactorStage& stage, int64_t first_output, int64_t begin, int64_t end,
               float* panel) const;
  void UnpackBCodes(const FactorStage& stage, int64_t first_output, int64_t begin, int64_t end,
                    uint8_t* panel) const;
  // Where a product of inputs [begin, end) goes: out[t][0..outputs) (+)= y[t] + bias.
  struct Product {
    const float* bias = nullptr;
    float* out = nullptr;
    int64_t out_stride = 0;
    int64_t outputs = 0;
    bool adds = false;
  };
  void MultiplyInput(const LinearCall& call, Arithmetic arithmetic, RowBlock rows, int64_t begin,
                     int64_t end, const uint8_t* panel, const Product& product) const;

  const CpuKernels* const kernels_;
  ThreadPool* const pool_;
  std::vector<LinearPart> rounded_parts_, float_parts_;  // of a call of few rows that has both
  std::vector<PartPlan> plans_;  // of the call at hand in front, older ones after them
  int64_t z_size_ = 0;
  AlignedBuffer<float> z_;
  CodedRows input_codes_;               // [rows][code_stride_]
  CodedRows hidden_codes_;              // of an MLP: [rows][in of its second half, rounded up]
  CodedRows z_codes_;                   // many rows only: like z_
  AlignedBuffer<uint16_t> bf16_input_;  // [rows][in rounded up to 16]
  int64_t code_stride_ = 0;
  int64_t bf16_stride_ = 0;
  QuantisedRow quantised_[kMaxFewRows];
  int64_t num_components_ = 0;  // of all stages of the call
  int64_t num_z_pieces_ = 0;
  std::atomic<int64_t> claimed_z_pieces_{0};
  std::atomic<int64_t> finished_z_pieces_{0};
  std::vector<ThreadState> threads_;
};

}  // namespace nestor
