package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// proxyInState is a proxy with one snapshot, whose page socket goes to pages.
func proxyInState(t *testing.T, state *atomic.Value, pages chan<- *os.File) Daemon {
	return standInFor(t, func(call call, connection *net.UnixConn) {
		if call.method == "OpenPages" {
			pages <- call.socket
			io.WriteString(connection, done)
			return
		}
		fmt.Fprintf(connection, `{"parameters":{"snapshot":{"id":%q,"state":%q,"reason":"why not","bytes":4096}}}`+"\x00", call.id, state.Load())
	})
}

func TestARoundCountsOnceTheCacheHoldsIt(t *testing.T) {
	var state atomic.Value
	state.Store(Awaited)
	var told []Round
	proxy := proxyInState(t, &state, make(chan *os.File, 1))
	source, err := NewSource(soon(t), Options{Snapshot: "web", Proxy: proxy, Round: func(round Round) { told = append(told, round) }})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if err := source.StartIter(); err != nil {
		t.Error(err)
	}
	state.Store(Receiving)
	if err := source.StopIter(); err == nil || !strings.Contains(err.Error(), "round 1 of snapshot web has ended, and it is receiving") {
		t.Errorf("%v", err)
	}
	state.Store(Paged)
	if err := source.StopIter(); err != nil || len(told) != 1 || told[0].Number != 1 || told[0].Bytes != 4096 || told[0].Last {
		t.Errorf("%v: %+v", err, told)
	}
	state.Store(Damaged)
	var damaged *DamagedError
	if err := source.StartIter(); !errors.As(err, &damaged) || damaged.Reason != "why not" {
		t.Errorf("%v", err)
	}
}

func TestTheEndOfItsContextEndsARoundUnderWay(t *testing.T) {
	var state atomic.Value
	state.Store(Paged)
	pages := make(chan *os.File, 1)
	ctx, cancel := context.WithCancel(context.Background())
	source, err := NewSource(ctx, Options{Snapshot: "web", Proxy: proxyInState(t, &state, pages)})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	cancel()
	// A proxy that reads finds the end, and so does CRIU.
	if rest, err := io.ReadAll(<-pages); err != nil || len(rest) > 0 {
		t.Errorf("%q: %v", rest, err)
	}
	if err := source.StartIter(); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestNoProxyIsFoundBeforeTheProcessIsTouched(t *testing.T) {
	if _, err := NewSource(soon(t), Options{Snapshot: "web", Proxy: "/nonexistent"}); err == nil {
		t.Error("a source without a proxy")
	}
	if _, err := NewSource(soon(t), Options{Proxy: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "no id") {
		t.Errorf("%v", err)
	}
}
