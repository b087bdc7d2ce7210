#pragma once

#include <cstdint>

namespace federa {

// Head h of token m at data + m * token + h * head: `dim` bfloat16s in a row.
template <class T>
struct HeadsOf {
    T* data;
    std::int64_t token, head;

    T* at(std::int64_t m, std::int64_t h) const { return data + m * token + h * head; }
};
using Heads = HeadsOf<const std::uint16_t>;
using HeadsOut = HeadsOf<std::uint16_t>;

// Attention within each of `examples` stretches of tokens: of example e the tokens offsets[e] to offsets[e + 1].
struct AttentionShape {
    const std::int64_t* offsets;
    std::int64_t examples, heads, dim;
    float scale;

    std::int64_t tokens() const { return offsets[examples]; }
};

// Whether the kernels below run here (AMX) and take heads of this size.
bool attention_available(std::int64_t dim);

// out = softmax(scale q k^T) v. The backward is given of each row the largest score and one over the sum of exponentials:
// softmax (2, heads, tokens).
void attention_forward(const AttentionShape& shape, Heads q, Heads k, Heads v, HeadsOut out, float* softmax,
                       int threads);

// dq, dk and dv by d_out, recomputing the scores.
void attention_backward(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads out, const float* softmax,
                        Heads d_out, HeadsOut dq, HeadsOut dk, HeadsOut dv, int threads);

}  // namespace federa
