// Numbers as the page writes them.

const NONE = "–";
// Made once: a formatter costs far more than what it formats, and a heat map has up to a thousand cells.
const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const TENTHS = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export function count(n) {
  return Number.isFinite(n) ? WHOLE.format(n) : NONE;
}

/** A mean: one digit after the point, none once it is large. */
export function mean(x) {
  if (!Number.isFinite(x)) return NONE;
  return (x < 1000 ? TENTHS : WHOLE).format(x);
}

export function ratio(over, under) {
  return over > 0 && under > 0 ? `${(over / under).toFixed(2)}x` : NONE;
}

export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(share * 100)} %` : NONE;
}

export function bytes(n) {
  if (!Number.isFinite(n)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit + 1 < units.length) {
    n /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || n >= 100 ? 0 : n >= 10 ? 1 : 2;
  return `${n.toFixed(digits)} ${units[unit]}`;
}

export function headName({ layer, head }) {
  return `layer ${layer}, head ${head}`;
}
