// The states of numerics.h against the same quantities in long double: any order, any split, any value. No framework: a
// failed check prints itself, and the program's exit status counts them.
#include "../numerics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

using rds_fast::LogSumExpState;
using rds_fast::NormOrder;
using rds_fast::NormState;

int failures = 0;
std::mt19937 generator(0);

// NaN equals NaN, infinities equal themselves, all else to a relative tolerance.
template <typename T>
void expect_close(T value, long double truth, long double tolerance, const std::string& what) {
  const T rounded = static_cast<T>(truth);
  const bool equal = std::isnan(rounded)   ? std::isnan(value)
                     : std::isinf(rounded) ? value == rounded
                                           : std::fabs(value - truth) <= tolerance * std::max(1.0L, std::fabs(truth));
  if (equal) return;
  ++failures;
  std::printf("FAILED %s: %.17g, should be %.17Lg\n", what.c_str(), static_cast<double>(value), truth);
}

// The norms span all magnitudes, so their tolerance is relative alone; half a subnormal is beyond any of them.
template <typename T>
void expect_relative(T value, long double truth, long double tolerance, const std::string& what) {
  const long double last_place = std::numeric_limits<T>::denorm_min();
  const bool finite = std::isfinite(static_cast<T>(truth));
  const bool near = std::fabs(value - truth) <= tolerance * std::fabs(truth) + last_place;
  if (finite ? near : (std::isnan(truth) ? std::isnan(value) : value == static_cast<T>(truth))) return;
  ++failures;
  std::printf("FAILED %s: %.17g, should be %.17Lg\n", what.c_str(), static_cast<double>(value), truth);
}

template <typename T>
constexpr long double kTolerance = 64 * std::numeric_limits<T>::epsilon();

// A state of the values pushed into several states, some of them empty, merged as a random tree.
template <typename State, typename T, typename Push, typename Merge>
State split_and_merge(std::vector<T> values, Push push, Merge merge) {
  std::shuffle(values.begin(), values.end(), generator);
  std::vector<State> states(1 + generator() % 7);
  for (const T value : values) push(states[generator() % states.size()], value);
  while (states.size() > 1) {
    std::shuffle(states.begin(), states.end(), generator);
    merge(states[0], states.back());
    states.pop_back();
  }
  return states[0];
}

template <typename T>
long double true_log_sum_exp(const std::vector<T>& values) {
  long double max = -INFINITY, sum = 0;
  for (const T value : values) {
    if (std::isnan(value)) return NAN;
    max = std::max(max, static_cast<long double>(value));
  }
  if (std::isinf(max)) return max;
  for (const T value : values) sum += std::exp(static_cast<long double>(value) - max);
  return max + std::log(sum);
}

template <typename T>
void check_log_sum_exp(const std::vector<T>& values, const std::string& what) {
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto state = split_and_merge<LogSumExpState<T>>(
        values, [](auto& state, T value) { state.push(value); }, [](auto& state, auto other) { state.merge(other); });
    expect_close(state.value(), true_log_sum_exp(values), kTolerance<T>, "log-sum-exp of " + what);
  }
}

template <typename T>
void test_log_sum_exp() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T largest = std::numeric_limits<T>::max();
  check_log_sum_exp<T>({}, "nothing");
  check_log_sum_exp<T>({T(3)}, "one value");
  check_log_sum_exp<T>({-inf}, "-inf");
  check_log_sum_exp<T>({-inf, -inf, -inf, -inf}, "-inf throughout");
  check_log_sum_exp<T>({-inf, T(-1000), -inf, T(-1001)}, "-inf beside far negative values");
  check_log_sum_exp<T>({inf, T(1), T(-1000), -inf}, "+inf beside all else");
  check_log_sum_exp<T>({inf, inf}, "+inf twice");
  check_log_sum_exp<T>({nan, T(1), T(2)}, "NaN");
  check_log_sum_exp<T>({nan, inf, -inf, T(5)}, "NaN beside infinities");
  check_log_sum_exp<T>({-largest, -largest / 2}, "the most negative values");
  check_log_sum_exp<T>({largest, T(0)}, "the largest value");
  check_log_sum_exp<T>({T(1000), T(1000), T(999)}, "values whose exponentials overflow");
  std::normal_distribution<double> normal;
  for (const int count : {2, 10, 1000}) {
    for (const double scale : {0.1, 10.0, 1000.0}) {
      std::vector<T> values(count);
      for (T& value : values) value = static_cast<T>(normal(generator) * scale);
      check_log_sum_exp(values, std::to_string(count) + " values of scale " + std::to_string(scale));
      values[count / 2] = -inf;
      check_log_sum_exp(values, std::to_string(count) + " values and -inf");
    }
  }
}

template <typename T>
long double true_norm(const std::vector<T>& values, long double p) {
  long double max = 0, sum = 0;
  for (const T value : values) {
    if (std::isnan(value)) return NAN;
    max = std::max(max, std::fabs(static_cast<long double>(value)));
  }
  if (std::isinf(p) || max == 0 || std::isinf(max)) return max;
  for (const T value : values) sum += std::pow(std::fabs(static_cast<long double>(value)) / max, p);
  return max * std::pow(sum, 1 / p);
}

template <typename T, NormOrder order>
void check_norm(const std::vector<T>& values, T p, const std::string& what) {
  const std::string name = std::to_string(static_cast<double>(p)) + "-norm of " + what;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto state = split_and_merge<NormState<T, order>>(
        values, [p](auto& state, T value) { state.push(value, p); },
        [p](auto& state, auto other) { state.merge(other, p); });
    expect_relative(state.value(p), true_norm(values, p), kTolerance<T>, name);
    if (order == NormOrder::infinity && !values.empty() && !std::isnan(state.scale)) {
      const auto ties = std::count_if(values.begin(), values.end(), [&](T x) { return std::fabs(x) == state.scale; });
      expect_relative(state.sum, static_cast<long double>(ties), 0, "ties of the " + name);
    }
  }
}

template <typename T>
void check_norms(const std::vector<T>& values, const std::string& what) {
  check_norm<T, NormOrder::one>(values, 1, what);
  check_norm<T, NormOrder::two>(values, 2, what);
  for (const T p : {T(1.5), T(3), T(50)}) check_norm<T, NormOrder::general>(values, p, what);
  check_norm<T, NormOrder::infinity>(values, std::numeric_limits<T>::infinity(), what);
}

template <typename T>
void test_norms() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T largest = std::numeric_limits<T>::max(), smallest = std::numeric_limits<T>::denorm_min();
  check_norms<T>({}, "nothing");
  check_norms<T>({T(0), T(0), T(-0.0)}, "zeros");
  check_norms<T>({T(-3)}, "one value");
  check_norms<T>({T(3), T(-4), T(0), T(4)}, "a tie");
  check_norms<T>({largest / 4, -largest / 4}, "values whose squares overflow");
  check_norms<T>({std::numeric_limits<T>::min(), std::numeric_limits<T>::min() / 2}, "values whose squares underflow");
  check_norms<T>({smallest, smallest, T(0)}, "the smallest values");
  check_norms<T>({largest / 4, smallest, T(1)}, "values of all magnitudes");
  check_norms<T>({inf, T(1), T(0)}, "+inf");
  check_norms<T>({inf, -inf, T(2)}, "infinities");
  check_norms<T>({nan, T(1), T(0)}, "NaN");
  check_norms<T>({nan, inf, T(1)}, "NaN beside +inf");
  std::normal_distribution<double> normal;
  for (const int count : {2, 10, 1000}) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(normal(generator) * std::exp(3 * normal(generator)));
    check_norms(values, std::to_string(count) + " values");
  }
}

template <typename T>
void test_factors() {
  using rds_fast::first_factor;
  using rds_fast::power_of_norm;
  using rds_fast::second_factor_root;
  for (const T k : {T(0.5), T(1), T(1.5), T(2), T(3)}) {
    const std::string power = "power " + std::to_string(static_cast<double>(k));
    expect_relative(power_of_norm(T(0), k), 0, 0, power + " of 0");
    expect_relative(first_factor(T(0), k), 0, 0, "first factor at 0, " + power);
    expect_relative(second_factor_root(T(0), k), 0, 0, "second factor at 0, " + power);
    for (const T n : {T(1e-30), T(0.25), T(7), T(1e12)}) {
      const long double exact = n;
      expect_relative(power_of_norm(n, k), std::pow(exact, static_cast<long double>(k)), kTolerance<T>, power);
      expect_relative(first_factor(n, k), k * std::pow(exact, k - 1.0L), kTolerance<T>, "first factor, " + power);
      const T root = second_factor_root(n, k);
      const long double square = static_cast<long double>(root) * root;
      expect_relative(static_cast<double>(square), std::pow(exact, k - 2.0L), kTolerance<T>, "second factor, " + power);
    }
  }
  const T tiny = std::numeric_limits<T>::denorm_min(), huge = std::numeric_limits<T>::max();
  for (const T n : {tiny, std::numeric_limits<T>::min(), T(3), huge / 2}) {
    const rds_fast::Quotient<T> over_n(n);
    expect_relative(over_n(n), 1, kTolerance<T>, "n / n");
    expect_relative(over_n(n / 2), static_cast<long double>(n / 2) / n, kTolerance<T>, "(n / 2) / n");
  }
}

void test_smoothed_target() {
  const rds_fast::SmoothedTarget<double> plain(0.0, 10, false), smoothed(0.1, 10, false), ignored(0.1, 10, true);
  expect_relative(plain.on, 1, 0, "weight of the class");
  expect_relative(plain.off, 0, 0, "weight of the others");
  expect_relative(smoothed.on + 10 * smoothed.off, 1, kTolerance<double>, "sum of the smoothed target");
  expect_relative(ignored.on + ignored.off + ignored.total, 0, 0, "an ignored row");
}

}  // namespace

int main() {
  test_log_sum_exp<float>();
  test_log_sum_exp<double>();
  test_norms<float>();
  test_norms<double>();
  test_factors<float>();
  test_factors<double>();
  test_smoothed_target();
  if (failures == 0) std::puts("numerics: all passed");
  return failures == 0 ? 0 : 1;
}
