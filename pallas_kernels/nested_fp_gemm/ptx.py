"""Four weights joined at once, as PTX instructions for both kernels.

$2 has four upper bytes and $3 four lower ones; $0 and $1 get two float16 each. The overlap bit is taken off
in every byte of a word, then `prmt` interleaves bytes: two instructions a weight, no 16-bit arithmetic.

subtle: a byte would borrow from its neighbour where upper is 0 and the top bit of lower is set: no encoded
  weight is such.
"""

JOIN = """{
.reg .b32 high, sign;
shr.b32 high, $3, 7;
and.b32 high, high, 0x01010101;
sub.u32 high, $2, high;
shr.b32 high, high, 1;
and.b32 high, high, 0x3F3F3F3F;
and.b32 sign, $2, 0x80808080;
or.b32 high, high, sign;
prmt.b32 $0, $3, high, 0x5140;
prmt.b32 $1, $3, high, 0x7362;
}"""
CONSTRAINTS = "=r,=r,r,r"
