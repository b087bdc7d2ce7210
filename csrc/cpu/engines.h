#pragma once

#include "cpu/lora_linear.h"

namespace federa {

// An implementation of lora_linear.h for processors with certain instructions.
struct Engine {
    const char* name;
    bool (*available)();
    bool bfloat16_rows;  // or x in float32 alone
    decltype(&federa::packed_bytes) packed_bytes;
    decltype(&federa::pack) pack;
    decltype(&federa::low_rank_linear) low_rank_linear;
    decltype(&federa::low_rank_gradient) low_rank_gradient;
};

extern const Engine amx, avx512, avx2;

}  // namespace federa
