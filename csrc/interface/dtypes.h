// The dtypes of tensors as numbers: the one list, which Python gets as DTYPES and INDEX_DTYPES.
#pragma once

namespace sparsekern {

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
constexpr const char* kDtypes[] = {"float32", "bfloat16", "float16", "float64"};

enum IndexType : int { kInt64, kInt32 };
constexpr const char* kIndexTypes[] = {"int64", "int32"};

}  // namespace sparsekern
