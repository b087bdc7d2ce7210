// The inner loops of lora_linear_fma.cpp. Included there once for each instruction set, inside a namespace and a region
// compiled for it, after Vector, LANES, HEIGHT, FETCH_AFTER, load, store, broadcast, multiply_add and widened.

// sums[row][v] += sum over k of x[row * x_row + k * x_step] p[v * p_panel + k * p_step + lane], in the order of k.
// Before every FETCH steps (0: never) a line of each of what comes next is fetched; unrolled, the steps are slower.
template <int FETCH, int ROWS, int VECTORS>
__attribute__((always_inline)) inline void multiply(Vector (&sums)[ROWS][VECTORS], const float* x, Index x_row,
                                                    Index x_step, const float* p, Index p_panel, Index p_step,
                                                    Index depth, const Next& next) {
    for (Index k = 0; k < depth;) {
        if constexpr (FETCH > 0) {
            __builtin_prefetch(next.p + k * next.p_step, 0, 2);
            __builtin_prefetch(next.x + k * next.x_step, 0, 2);
        }
        const Index stop = FETCH == 0 ? depth : FETCH == 1 || k + FETCH < depth ? k + FETCH : depth;
        for (; k < stop; ++k, x += x_step, p += p_step) {
            Vector columns[VECTORS];
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) columns[v] = load(p + v * p_panel);
#pragma GCC unroll 9
            for (int row = 0; row < ROWS; ++row) {
                const Vector factor = broadcast(x + row * x_row);
#pragma GCC unroll 3
                for (int v = 0; v < VECTORS; ++v) sums[row][v] = multiply_add(factor, columns[v], sums[row][v]);
            }
        }
    }
}

template <int ROWS, int VECTORS>
void block_product(const Block& b) {
    // The result may lie in memory by now, and is wanted only after the product: 141 -> 150 GFLOP/s at 2048x3072x768.
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; v += 16 / LANES) __builtin_prefetch(b.out + row * b.out_stride + v * LANES, 1);
    Vector sums[ROWS][VECTORS];
#pragma GCC unroll 9
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v)
            sums[row][v] = b.start ? load(b.start + (row * VECTORS + v) * LANES) : Vector{};
    multiply<VECTORS == 3 ? FETCH_AFTER : 0>(sums, b.x, X_STRIDE, 1, b.p, b.p_panel, LANES, b.depth, b.next);
    multiply<0>(sums, b.h, H_STRIDE, 1, b.up, b.up_panel, LANES, b.rank, b.next);
#pragma GCC unroll 9
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) {
            if (b.base) sums[row][v] += load(b.base + row * b.base_stride + v * LANES);
            store(b.out + row * b.out_stride + v * LANES, sums[row][v]);
        }
}

// sums[r][k] += sum over the rows of h[row][r] x[row][k].
template <int ROWS, int VECTORS>
void outer_products(const float* h, Index h_stride, const float* x, Index x_stride, Index rows, float* sums,
                    Index sums_stride, const Next& next) {
    Vector own[ROWS][VECTORS] = {};
    multiply<VECTORS == 3 ? 1 : 0>(own, h, 1, h_stride, x, LANES, x_stride, rows, next);
#pragma GCC unroll 9
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) {
            float* to = sums + r * sums_stride + v * LANES;
            store(to, load(to) + own[r][v]);
        }
}

template <int ROWS>
void any_block_product(const Block& b, Index rows, Index vectors) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return any_block_product<ROWS - 1>(b, rows, vectors);
    if (vectors == 3) block_product<ROWS, 3>(b);
    else if (vectors == 2) block_product<ROWS, 2>(b);
    else block_product<ROWS, 1>(b);
}

template <int ROWS>
void any_outer_products(const float* h, Index h_stride, const float* x, Index x_stride, Index rows, float* sums,
                        Index sums_stride, const Next& next, Index components, Index vectors) {
    if constexpr (ROWS > 1)
        if (components < ROWS)
            return any_outer_products<ROWS - 1>(h, h_stride, x, x_stride, rows, sums, sums_stride, next, components,
                                                vectors);
    if (vectors == 3) outer_products<ROWS, 3>(h, h_stride, x, x_stride, rows, sums, sums_stride, next);
    else outer_products<ROWS, 1>(h, h_stride, x, x_stride, rows, sums, sums_stride, next);
}

void widen(const bf16* from, Index vectors, float* to) {
    for (Index i = 0; i < vectors; ++i) store(to + i * LANES, widened(from + i * LANES));
}

constexpr Loops loops{LANES, HEIGHT, any_block_product<HEIGHT>, any_outer_products<HEIGHT>, widen};
