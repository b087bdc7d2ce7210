#pragma once

#include <vector>

namespace federa {

// The eigenproblem of a symmetric band matrix H (m, m). Kept from one matrix to the next, it keeps its memory, whose
// pages would cost more than the work.
//
// Givens rotations to tridiagonal form (Schwarz 1968), then implicit QL; eigenvectors by the same rotations:
// O(m^2 (width + count)), where a dense solver takes O(m^3).
class SymmetricBand {
  public:
    // H = 0, with `width` diagonals on either side of the main one.
    void reset(long m, long width);

    // H[i, j], j <= i <= j + width
    double& below(long i, long j) { return band_[j * stride_ + i - j]; }

    // All of them, descending; H is used up.
    const std::vector<double>& eigenvalues();

    // After `eigenvalues`: the last `rows` entries of the eigenvectors of the first `count`, (count, rows) row-major.
    void ends_of_eigenvectors(long count, long rows, double* ends) const;

    // After `eigenvalues`: the eigenvectors of the first `count`, (m, count) row-major.
    void eigenvectors(long count, double* vectors) const;

  private:
    struct Rotation {  // of rows i and i + 1: (c, s; -s, c)
        int i;
        double c, s;
    };

    void eliminate(long p, long column, long high);
    void tridiagonalise();
    void implicit_ql();

    long m_ = 0, width_ = 0, stride_ = 0;
    std::vector<double> band_, d_, e_, values_;
    std::vector<long> order_;
    std::vector<Rotation> rotations_;
};

}  // namespace federa
