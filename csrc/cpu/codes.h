// Codes that pass through the C interfaces. Shared with asyncopd/backends/{cpu,cuda}.py and csrc/cuda.
#pragma once

namespace asyncopd {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum IdType : int { kInt32 = 0, kInt64 = 1 };

// Ids that are no column. kElsewhere is one that another shard of the vocabulary holds: gradients alone know it.
enum SpecialId : int { kPad = -1, kElsewhere = -2 };

// What a launcher returns. CUDA launchers return the negative of a cudaError_t instead of kBadId and kBadArgument.
enum Status : int { kOk = 0, kBadId = 1, kBadArgument = 2, kSampledSupport = 3, kNoPolicy = 4 };

}  // namespace asyncopd
