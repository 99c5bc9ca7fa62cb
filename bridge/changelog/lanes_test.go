package changelog

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// A row of COPY with a lane, a seq, and something of any size.
func testRow(random *rand.Rand, seq uint64) []byte {
	b := binary.BigEndian.AppendUint16(nil, copyColumnCount)
	for column, size := range []uint32{8, 8, 4, 4, 2} {
		b = binary.BigEndian.AppendUint32(b, size)
		switch column {
		case 0:
			b = binary.BigEndian.AppendUint64(b, seq)
		case 4:
			b = binary.BigEndian.AppendUint16(b, uint16(random.IntN(laneCount)))
		default:
			b = append(b, make([]byte, size)...)
		}
	}
	for range copyColumnCount - 5 {
		if random.IntN(3) == 0 {
			b = binary.BigEndian.AppendUint32(b, 0xffffffff)
			continue
		}
		value := make([]byte, random.IntN(300))
		if random.IntN(5000) == 0 {
			value = make([]byte, chunkSize+random.IntN(chunkSize))
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
		b = append(b, value...)
	}
	return b
}

// The rows are those that were there, and each lane's are in the order they had, and together within a window.
func TestByLane(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, count := range []int{0, 1, 100, 5000} {
		var rows []byte
		want := map[uint16][][]byte{}
		for seq := range count {
			row := testRow(random, uint64(seq))
			rows = append(rows, row...)
			want[rowLane(row)] = append(want[rowLane(row)], row)
		}
		header := []byte("d1234")
		sorted := byLane(slices.Clone(header), rows)
		if !bytes.HasPrefix(sorted, header) || len(sorted) != len(header)+len(rows) {
			t.Fatalf("%d rows: %d bytes became %d", count, len(rows), len(sorted)-len(header))
		}
		runs, last := 0, -1
		for at := len(header); at < len(sorted); {
			row := sorted[at : at+rowSize(sorted[at:])]
			at += len(row)
			lane := rowLane(row)
			if len(want[lane]) == 0 || !bytes.Equal(row, want[lane][0]) {
				t.Fatalf("%d rows: lane %d goes on with seq %d", count, lane, binary.BigEndian.Uint64(row[6:]))
			}
			want[lane] = want[lane][1:]
			if int(lane) != last {
				runs, last = runs+1, int(lane)
			}
		}
		if most := (len(rows)/chunkSize + 1) * laneCount; runs > most {
			t.Errorf("%d rows are in %d runs of a lane, and not in %d", count, runs, most)
		}
	}
}
