#pragma once

#include <vector>

namespace federa {

struct Rotation {  // of rows i and j: (c, s; -s, c)
    int i, j;
    double c, s;
};

// The eigenvalues of a symmetric band matrix, descending, and the eigenvectors of the first `count` of them.
//
//   H        (m, m) row-major with at most `width` diagonals on either side of the main one; overwritten
//   values   (m)
//   vectors  (m, count) row-major
//   scratch  kept by the caller from one call to the next: about 2 m^2 entries, whose pages would cost more than the work
//
// Givens rotations to tridiagonal form (Schwarz 1968), implicit QL; eigenvectors by the same rotations, applied in
// reverse to unit vectors: O(m^2 (width + count)), where a dense solver takes O(m^3).
void leading_eigenpairs(std::vector<double>& H, long m, long width, long count, double* values, double* vectors,
                        std::vector<Rotation>& scratch);

}  // namespace federa
